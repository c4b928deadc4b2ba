"""The methods of fine-tuning. A new one: its settings in config/adapter.py, and a function that makes a Tuned of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyhead_core.backbone import Backbone
from polyhead_trainer.config import AdapterSettings
from polyhead_trainer.methods.full import full
from polyhead_trainer.methods.head import head
from polyhead_trainer.methods.peft_methods import lora
from polyhead_trainer.methods.tuned import Tuned, trained_parameters

__all__ = ["METHODS", "Tuned", "trained_parameters", "tune"]

METHODS: dict[str, Callable[[Backbone, Any], Tuned]] = {"lora": lora, "full": full, "head": head}
"""Each takes the backbone and its own class of settings."""


def tune(backbone: Backbone, settings: AdapterSettings, seed: int) -> Tuned:
    """Puts a fresh adapter on the backbone, or opens its weights, in place. Raises ConfigError."""
    torch.manual_seed(seed)
    tuned = METHODS[settings.method](backbone, settings)
    for name, parameter in trained_parameters(tuned.model).items():
        assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}"
    return tuned
