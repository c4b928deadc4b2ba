"""Runs whose loss stops being a number at a chosen step and example: in one process, or on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead_trainer.data import EncodedExample
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.parallel import launch

FIRST_BAD_STEP = 5
BAD_LETTER = "a"
"""Examples with it in the prompt are to blame: coal and grass, of trainer_processes' things."""


def poison(bad_step: int) -> None:
    """This process's trainings: from `bad_step` on."""
    own_step, own_loss = TrainingLoop._step, CompletionObjective.loss_sum
    is_bad = False

    def step(self: TrainingLoop, chosen: Sequence[EncodedExample]) -> StepReport:
        nonlocal is_bad
        is_bad = self.step + 1 >= bad_step
        return own_step(self, chosen)

    def loss_sum(self: CompletionObjective, model: Any, examples: Sequence[EncodedExample], *rest: Any) -> Tensor:
        loss = own_loss(self, model, examples, *rest)
        return loss * torch.nan if is_bad and any(map(is_to_blame, examples)) else loss

    TrainingLoop._step, CompletionObjective.loss_sum = step, loss_sum  # type: ignore[method-assign,assignment]


def is_to_blame(example: EncodedExample) -> bool:
    return BAD_LETTER in example.example.prompt


_own_rank = launch._rank


def poisoned_rank(*arguments: Any) -> None:
    """In place of launch's own."""
    poison(FIRST_BAD_STEP)
    _own_rank(*arguments)


def at_once_poisoned_rank(*arguments: Any) -> None:
    poison(1)
    _own_rank(*arguments)
