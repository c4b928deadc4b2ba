"""What is left when a loss is not a number any more: the batch that it came from, and the last weights without it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.methods import Tuned
from polyhead_trainer.publish import publish_without_record
from polyhead_trainer.record import BackboneFacts
from polyhead_trainer.trained_state import copy_state, restore_state


@dataclass
class LastGood:
    """Implements Hook: holds the last weights whose loss was computed and was a number.

    A step's update is judged by the next step's loss, so two copies are held: the good one, and the one on trial. That
    is little for an adapter; of a whole model, or of one in shards, no copy is held.
    """

    num_ranks: int = 1

    good_step: int | None = None
    """Steps that the good weights have learned from."""
    _good: dict[str, Tensor] | None = None
    _trial: dict[str, Tensor] | None = field(default=None)

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        if not loop.tuned.is_adapter or self.num_ranks > 1:
            return
        self._good, self._trial = self._trial, self._good
        if self._good is not None:
            self.good_step = report.step - 1
        self._trial = copy_state(loop.tuned, into=self._trial)

    def restore(self, tuned: Tuned) -> bool:
        """False where no step was good yet."""
        if self._good is None:
            return False
        restore_state(tuned, self._good)
        return True


def keep_what_is_left(
    error: TrainingDiverged, last_good: LastGood, tuned: Tuned, output: Path, backbone: BackboneFacts
) -> TrainingDiverged:
    """Saves the batch's token ids and the last good adapter beside `output`; the error, with their places in it.

    Checkpoints stay as they are.
    """
    batch_file = _beside(output, "diverged.json")
    rows = [
        {"origin": one.example.origin, "token_ids": one.token_ids, "is_label": [int(label) for label in one.is_label]}
        for one in error.examples
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    batch_file.write_text(json.dumps({"step": error.step, "examples": rows}, indent=1) + "\n", encoding="utf-8")
    message = f"{error.message}; the step's token ids are in {batch_file}"
    if last_good.restore(tuned):
        place = _beside(output, "last-good")
        publish_without_record(tuned, place, fingerprint=backbone.fingerprint, quantization=backbone.quantization)
        message += f"; the adapter after {last_good.good_step} steps, the last with a finite loss, is in {place}"
    elif tuned.is_adapter and last_good.num_ranks == 1:
        message += "; no earlier step had shown a finite loss, so that no adapter is kept"
    latest = CheckpointDirectory(output).latest()
    if latest is not None:
        message += f"; the last checkpoint is {latest}"
    return TrainingDiverged(message, step=error.step, examples=error.examples)


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f"{output.name}.{suffix}")
