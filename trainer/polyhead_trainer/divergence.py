"""What is left when a loss is not a number any more: the batch that it came from, and the last weights without it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.methods import Tuned
from polyhead_trainer.parallel import Ranks, gather_trained
from polyhead_trainer.publish import publish_without_record
from polyhead_trainer.record import BackboneFacts
from polyhead_trainer.trained_state import copy_state, restore_state


@dataclass
class LastGood:
    """Implements DivergenceHook: holds the last weights whose loss was computed and was a number.

    A step's update is judged by the next step's loss, so two copies are held: the good one, and the one on trial. That
    is little for an adapter, of which each rank copies what it holds; of a whole model no copy is held.
    """

    good_step: int | None = None
    """Steps that the good weights have learned from."""
    _good: dict[str, Tensor] | None = None
    _trial: dict[str, Tensor] | None = None
    _is_restored: bool = False

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        if not loop.tuned.is_adapter:
            return
        self._good, self._trial = self._trial, self._good
        if self._good is not None:
            self.good_step = report.step - 1
        self._trial = copy_state(loop.tuned, into=self._trial)

    def after_divergence(self, loop: TrainingLoop) -> None:
        """Puts the good weights back and makes them whole on the main rank, which alone saves them."""
        if self.restore(loop.tuned):
            gather_trained(loop.tuned.model, loop.ranks, frozen_too=loop.tuned.saves_frozen)

    def restore(self, tuned: Tuned) -> bool:
        """False where no step was good yet. No step follows."""
        if self._good is None:
            return False
        if not self._is_restored:
            restore_state(tuned, self._good)
            self._is_restored = True
        return True


def diverged_at_the_end(loop: TrainingLoop, before: Measures, after: Measures) -> TrainingDiverged | None:
    """Where the last step's update is what has ruined the weights: no later step's loss could tell."""
    if math.isfinite(after.held_out_loss) or not math.isfinite(before.held_out_loss):
        return None
    return TrainingDiverged(
        f"after step {loop.step}, the last one, the held-out loss is {after.held_out_loss}: not a number any more; try "
        "a smaller training.learning_rate",
        step=loop.step,
        examples=loop.last_examples,
    )


def keep_what_is_left(
    error: TrainingDiverged,
    last_good: LastGood,
    tuned: Tuned,
    output: Path,
    backbone: BackboneFacts,
    ranks: Ranks,
) -> TrainingDiverged:
    """Saves the batch's token ids and the last good adapter beside `output`; the error, with their places in it.

    On several ranks this is the main one's, after the loop has told `last_good` on all of them. Checkpoints stay as
    they are.
    """
    checkpoints = _checkpoints_left(CheckpointDirectory(output), error.step)
    if not error.examples:  # the step was another process's, which has kept what there was
        return TrainingDiverged(error.message + checkpoints, step=error.step)
    batch_file = _beside(output, "diverged.json")
    rows = [
        {
            "origin": one.example.origin,
            "rank": ranks.rank_of(index),
            "token_ids": one.token_ids,
            "is_label": [int(label) for label in one.is_label],
        }
        for index, one in enumerate(error.examples)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    batch_file.write_text(json.dumps({"step": error.step, "examples": rows}, indent=1) + "\n", encoding="utf-8")
    message = f"{error.message}; the step's token ids are in {batch_file}"
    if last_good.restore(tuned):
        place = _beside(output, "last-good")
        publish_without_record(tuned, place, fingerprint=backbone.fingerprint, quantization=backbone.quantization)
        message += f"; the adapter after {last_good.good_step} steps, the last with a finite loss, is in {place}"
    elif tuned.is_adapter:
        message += "; no earlier step had shown a finite loss, so that no adapter is kept"
    return TrainingDiverged(message + checkpoints, step=error.step, examples=error.examples)


def _checkpoints_left(checkpoints: CheckpointDirectory, failed_step: int) -> str:
    """A checkpoint made right before the step that failed can hold the very weights that made it fail."""
    steps = checkpoints.steps()
    if not steps:
        return ""
    last = checkpoints.at(steps[-1])
    if steps[-1] < failed_step - 1:
        return f"; the last checkpoint is {last}"
    earlier = f"; {checkpoints.at(steps[-2])} is from before" if len(steps) > 1 else ""
    which = "these weights" if steps[-1] >= failed_step else f"the weights that step {failed_step} began with"
    return f"; the last checkpoint is {last}, with {which}{earlier}"


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(f"{output.name}.{suffix}")
