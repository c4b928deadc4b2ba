"""`trainer export`: what a run's checkpoint holds, as the run would have published it; the run is not touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones, methods
from polyhead_trainer.checkpoint import CheckpointDirectory, SavedRun
from polyhead_trainer.checkpoint.tensors import load_into
from polyhead_trainer.config import RunConfig
from polyhead_trainer.publish import check_output, publish_without_record
from polyhead_trainer.storage import writing
from polyhead_trainer.tasks import open_task


@dataclass(frozen=True, kw_only=True)
class Exported:
    checkpoint: Path
    step: int
    output: Path
    is_adapter: bool
    """Else a whole model, as transformers loads it."""


def export(config: RunConfig, output: Path, *, step: int | None = None) -> Exported:
    """Of the checkpoint after `step`, the latest by default, written by however many ranks, in one process.

    Raises ConfigError, ResumeRefused, BackboneError, AdapterMismatch, StorageFailed.
    """
    check_output(output, overwrite=False)
    checkpoint = _checkpoint(CheckpointDirectory(config.output), step)
    saved = SavedRun.read(checkpoint)
    backbone = backbones.load(backbones.on_host(config.backbone))
    backbones.check_trained_on(backbone, checkpoint, saved.identity.backbone_fingerprint)
    task = open_task(config, backbone)
    saved.identity.check_makes(config.with_labels(task.labels), checkpoint)
    tuned = methods.tune(task.backbone, config.adapter, config.training.seed)
    load_into({"trained": tuned.trained_state()}, checkpoint)
    with writing(output, f"{checkpoint} stays as it is"):
        output.parent.mkdir(parents=True, exist_ok=True)
        publish_without_record(tuned, output, fingerprint=backbone.fingerprint, quantization=backbone.quantization)
    return Exported(checkpoint=checkpoint, step=saved.step, output=output, is_adapter=tuned.is_adapter)


def _checkpoint(directory: CheckpointDirectory, step: int | None) -> Path:
    steps = directory.steps()
    if not steps:
        raise ConfigError(f"{directory.path} holds no complete checkpoint; those of a finished run are gone")
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: {directory.path} has those after steps {', '.join(map(str, steps))}")
    return directory.at(steps[-1] if step is None else step)
