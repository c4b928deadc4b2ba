"""What every task provides to a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.methods import Tuned
from polyhead_trainer.objectives import Objective


class Evaluator(Protocol):
    """The held-out examples of one run, prepared once for several models."""

    @property
    def answered(self) -> list[EncodedExample]:
        """The examples that `Measures.answers` answer."""

    def measure(self, model: nn.Module) -> Measures: ...

    def held_out_loss(self, model: nn.Module) -> float:
        """As `measure` gives it, alone; `model` must be in evaluation mode."""

    def earlier_loss(self, model: nn.Module) -> float | None:
        """The same of `Measures.earlier_loss`."""


class Task(Protocol):
    @property
    def backbone(self) -> Backbone:
        """The backbone with the output that the task needs: what a method tunes."""

    @property
    def labels(self) -> list[str]:
        """Of a classification, in the order of the scores; empty elsewhere."""

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        """Raises DataError for a record of another form."""

    def objective(self, tuned: Tuned) -> Objective: ...

    def evaluator(self, held_out: Sequence[EncodedExample]) -> Evaluator:
        """To be called before a method touches the backbone. Raises ConfigError, DataError."""

    def reload(self, directory: Path) -> nn.Module:
        """The backbone with an adapter that a run of this task left. Raises AdapterRejected and its kin."""
