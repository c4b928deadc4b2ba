"""What every method makes of a backbone: a model to train, a way back to the untouched one, and files at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from polyhead_trainer.config import TrainingSection

_FACTORS = ("ia3_l", "lora_magnitude_vector")
"""In the names of peft's parameters that multiply the backbone's values or norms."""


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


def at_one_rate(parameters: dict[str, nn.Parameter], rate: float, settings: TrainingSection) -> list[dict[str, Any]]:
    """Groups for the optimizer, of which factors and biases do not decay: 0 is no neutral value of theirs."""
    if not settings.weight_decay:
        return [{"params": list(parameters.values()), "lr": rate}]
    kept = {name for name, one in parameters.items() if one.ndim < 2 or any(part in name for part in _FACTORS)}
    decaying = [one for name, one in parameters.items() if name not in kept]
    others = [one for name, one in parameters.items() if name in kept]
    groups = [{"params": decaying, "lr": rate}, {"params": others, "lr": rate, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass
class TrainedAtOneRate:
    """The half of Tuned that most methods share: all that requires gradients is trained, and at one learning rate."""

    model: nn.Module

    @property
    def saves_frozen(self) -> bool:
        return False

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        return at_one_rate(trained_parameters(self.model), settings.learning_rate, settings)

    def trained_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}
