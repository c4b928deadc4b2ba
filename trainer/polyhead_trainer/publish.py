"""The adapter's directory: complete or absent, never half written, never over somebody's finished run unasked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel

from polyhead_core.adapter_directory import CONFIG_FILE, content_hash, stamp_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.card import model_card
from polyhead_trainer.errors import OutputExists
from polyhead_trainer.record import METRICS_FILE, RunRecord


def check_output(output: Path, overwrite: bool) -> None:
    """Raises before the work is done what `publish` would raise after it."""
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / CONFIG_FILE).is_file()):
        raise ConfigError(f"output = {output} is there and is no adapter: it is not touched; choose another")
    if not overwrite and (output / CONFIG_FILE).is_file():
        raise OutputExists(f"{output} holds a finished run; choose another output, or replace it with --overwrite")


def publish(model: PeftModel, record: RunRecord, *, overwrite: bool) -> str:
    """Writes the directory and returns its content hash. Raises OutputExists, ConfigError."""
    output = record.config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name with a dot in front: a server that watches the parent folder does not take it for an adapter.
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write(model, record, staging)
        identity = content_hash(staging)
        check_output(output, overwrite)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return identity


def _write(model: PeftModel, record: RunRecord, directory: Path) -> None:
    os.chmod(directory, 0o755)
    model.save_pretrained(str(directory), save_embedding_layers=record.config.adapter.save_embedding_layers)
    stamp_backbone(directory, fingerprint=record.backbone.fingerprint, quantization=record.backbone.quantization)
    (directory / METRICS_FILE).write_text(record.to_json(), encoding="utf-8")
    (directory / "README.md").write_text(model_card(record), encoding="utf-8")


def _replace(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(retired / output.name)
    staging.rename(output)
    shutil.rmtree(retired)
