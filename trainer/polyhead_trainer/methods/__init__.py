"""The methods of fine-tuning. A new one: its settings in config/adapter.py, and a function that makes a Tuned of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import Backbone
from polyhead_trainer.config import AdapterSettings
from polyhead_trainer.methods.bottleneck import BOTTLENECK_TYPE, bottleneck, load_bottleneck
from polyhead_trainer.methods.full import full
from polyhead_trainer.methods.head import head
from polyhead_trainer.methods.lora import lora
from polyhead_trainer.methods.peft_tuned import reload_peft
from polyhead_trainer.methods.prompts import llama_adapter, p_tuning, prefix_tuning, prompt_tuning
from polyhead_trainer.methods.rescaling import ia3, ln_tuning
from polyhead_trainer.methods.tuned import Tuned, trained_parameters

__all__ = ["METHODS", "Tuned", "reload_adapter", "trained_parameters", "tune"]

METHODS: dict[str, Callable[[Backbone, Any], Tuned]] = {
    "lora": lora,
    "ia3": ia3,
    "ln_tuning": ln_tuning,
    "prefix_tuning": prefix_tuning,
    "prompt_tuning": prompt_tuning,
    "p_tuning": p_tuning,
    "llama_adapter": llama_adapter,
    "bottleneck": bottleneck,
    "full": full,
    "head": head,
}
"""Each takes the backbone and its own class of settings."""


def tune(backbone: Backbone, settings: AdapterSettings, seed: int) -> Tuned:
    """Puts a fresh adapter on the backbone, or opens its weights, in place. Raises ConfigError."""
    torch.manual_seed(seed)
    tuned = METHODS[settings.method](backbone, settings)
    for name, parameter in trained_parameters(tuned.model).items():
        assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}"
    return tuned


def reload_adapter(backbone: Backbone, directory: Path) -> nn.Module:
    """The backbone with an adapter that one of the methods left. Raises AdapterRejected and its kin, BackboneError."""
    if read_adapter_directory(directory.resolve()).config.get("peft_type") == BOTTLENECK_TYPE:
        return load_bottleneck(backbone, directory)
    return reload_peft(backbone, directory)
