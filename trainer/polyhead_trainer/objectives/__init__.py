"""What a run learns to do: how examples become tokens, and what the loss of some of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from polyhead_trainer.data import EncodedExample
from polyhead_trainer.objectives.completion import CompletionObjective

__all__ = ["CompletionObjective", "Objective"]


class Objective(Protocol):
    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        """What the loss is averaged over: label tokens, or examples, or pairs."""

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        """The loss summed over the units of `examples`, so that micro-batches add up to the large batch."""
