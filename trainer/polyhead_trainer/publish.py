"""The adapter's directory: complete or absent, never half written, never over somebody's finished run unasked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from polyhead_core.adapter_directory import CONFIG_FILE
from polyhead_core.errors import ConfigError
from polyhead_trainer.card import model_card
from polyhead_trainer.errors import OutputExists
from polyhead_trainer.html_report import render
from polyhead_trainer.methods import Tuned
from polyhead_trainer.plots import loss_curve
from polyhead_trainer.record import METRICS_FILE, RunRecord
from polyhead_trainer.tracking import EventFiles


def check_output(output: Path, overwrite: bool) -> None:
    """Raises before the work is done what `publish` would raise after it."""
    if not output.exists():
        return
    finished = (output / CONFIG_FILE).is_file() or (output / METRICS_FILE).is_file()
    if not output.is_dir() or (any(output.iterdir()) and not finished):
        raise ConfigError(f"output = {output} is there and is no run's output: it is not touched; choose another")
    if not overwrite and finished:
        raise OutputExists(f"{output} holds a finished run; choose another output, or replace it with --overwrite")


def publish(tuned: Tuned, record: RunRecord, events: EventFiles, *, overwrite: bool) -> str:
    """Writes the directory, with a copy of `events`, and returns its content hash. Raises OutputExists, ConfigError."""
    output = record.config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name with a dot in front: a server that watches the parent folder does not take it for an adapter.
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        identity = _write(tuned, record, staging)
        events.publish(staging)
        check_output(output, overwrite)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return identity


def publish_without_record(tuned: Tuned, directory: Path, *, fingerprint: str, quantization: str) -> None:
    """Writes what was trained, without a record of a run, complete or not at all, over an earlier one of this kind."""
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        os.chmod(staging, 0o755)
        tuned.save(staging, fingerprint=fingerprint, quantization=quantization)
        check_output(directory, overwrite=True)
        _replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(tuned: Tuned, record: RunRecord, directory: Path) -> str:
    os.chmod(directory, 0o755)
    identity = tuned.save(directory, fingerprint=record.backbone.fingerprint, quantization=record.backbone.quantization)
    (directory / METRICS_FILE).write_text(record.to_json(), encoding="utf-8")
    (directory / "README.md").write_text(model_card(record), encoding="utf-8")
    curve = loss_curve(record)
    (directory / "loss.png").write_bytes(curve)
    (directory / "report.html").write_text(render(record, curve), encoding="utf-8")
    return identity


def _replace(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(retired / output.name)
    staging.rename(output)
    shutil.rmtree(retired)
