"""What every method makes of a backbone: a model to train, a way back to the untouched one, and files at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from polyhead_trainer.config import TrainingSection


class Tuned(Protocol):
    @property
    def model(self) -> nn.Module:
        """Called as the backbone is. What is trained requires gradients, and nothing else does."""

    @property
    def is_adapter(self) -> bool:
        """Whether `save` writes an adapter's directory (PEFT's two files) or a whole model's."""

    @property
    def saves_frozen(self) -> bool:
        """Whether `save` also writes weights that were not trained."""

    def baseline(self) -> AbstractContextManager[None]:
        """Inside, `model` computes what the backbone did before the method touched it."""

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        """For the optimizer: every trained parameter once, each group with its own peak `lr`."""

    def trained_state(self) -> dict[str, Tensor]:
        """The trained parameters by their names in `model`: what a checkpoint keeps."""

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        """Writes what the run leaves, with the backbone's identity in it, into an empty folder; returns the identity
        of what was written."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass
class TrainedAtOneRate:
    """The half of Tuned that most methods share: all that requires gradients is trained, and at one learning rate."""

    model: nn.Module

    @property
    def saves_frozen(self) -> bool:
        return False

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        return [{"params": list(trained_parameters(self.model).values()), "lr": settings.learning_rate}]

    def trained_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}
