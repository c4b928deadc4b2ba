"""`trainer evaluate`: measures adapters that are there, and their backbones, as `trainer run` measured them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import RunConfig, load_config, parse_config
from polyhead_trainer.record import METRICS_FILE, read_record

if TYPE_CHECKING:
    from rich.console import Console

    from polyhead_trainer.evaluate import Measures


@dataclass(frozen=True, kw_only=True)
class Subject:
    adapter: Path
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Measured:
    adapter: Path
    content_hash: str
    before: Measures
    """Of the backbone alone."""
    after: Measures

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapter": str(self.adapter),
            "content_hash": self.content_hash,
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
        }


def read_subject(path: Path, overrides: Sequence[str]) -> Subject:
    """A configuration names its output's adapter; an adapter brings the configuration that made it.

    Raises ConfigError.
    """
    if not path.is_dir():
        config = load_config(path, overrides)
        return Subject(adapter=config.output, config=config)
    record = read_record(path)
    if record is None:
        raise ConfigError(
            f"{path} has no readable {METRICS_FILE}, which says what to measure on: give the run's configuration, with "
            f"--set output={path}"
        )
    origin = str(path / METRICS_FILE)
    return Subject(adapter=path, config=parse_config(record["config"], origin, overrides))


def measure(subject: Subject) -> Measured:
    """Raises AdapterRejected and its kin, BackboneError, ConfigError, DataError."""
    from polyhead_core.backbone.checkpoint import compute_fingerprint
    from polyhead_trainer import backbones
    from polyhead_trainer.data import load_examples
    from polyhead_trainer.methods.full import is_whole_model
    from polyhead_trainer.tasks import open_task

    config = subject.config
    backbone = backbones.load(config.backbone)
    if is_whole_model(subject.adapter):
        content_hash = compute_fingerprint(subject.adapter)
    else:
        files = read_adapter_directory(subject.adapter.resolve())
        content_hash = files.content_hash
        backbones.check_trained_on(backbone, subject.adapter, files.backbone_fingerprint)
    task = open_task(config, backbone)
    held_out = load_examples(
        config.data.held_out, backbone.tokenizer, config.data.max_length, task.encode, config.data.columns
    )
    evaluator = task.evaluator(held_out.examples)
    before = evaluator.measure(task.backbone.model)
    after = evaluator.measure(task.reload(subject.adapter))
    return Measured(adapter=subject.adapter, content_hash=content_hash, before=before, after=after)


def print_measured(console: Console, measured: Sequence[Measured]) -> None:
    from rich.table import Table
    from rich.text import Text

    from polyhead_trainer.report import comparison

    table = Table("adapter", "measure", "backbone", "tuned")
    for one in measured:
        for row in comparison(one.before, one.after):
            table.add_row(Text(one.adapter.name), *row)
    console.print(table)
