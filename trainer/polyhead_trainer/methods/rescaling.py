"""Methods that learn scales alone, by peft: (IA)3, and the scales of the normalisations."""

from __future__ import annotations

import torch
from peft import IA3Config, LNTuningConfig

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import Ia3Settings, LnTuningSettings
from polyhead_trainer.methods.peft_tuned import PeftTuned, task_type, wrap


def ia3(backbone: Backbone, settings: Ia3Settings) -> PeftTuned:
    config = IA3Config(
        task_type=task_type(backbone.model),
        target_modules=settings.target_modules,
        feedforward_modules=settings.feedforward_modules,
    )
    return PeftTuned(wrap(backbone, config, settings.warm_start))


def ln_tuning(backbone: Backbone, settings: LnTuningSettings) -> PeftTuned:
    if backbone.dtype != torch.float32:
        raise ConfigError(
            f"adapter.method = ln_tuning trains the normalisations themselves, in float32, and this backbone computes "
            f"in {backbone.dtype_name}: set backbone.dtype = float32"
        )
    targets = settings.target_modules or normalisations(backbone)
    config = LNTuningConfig(task_type=task_type(backbone.model), target_modules=targets)
    return PeftTuned(wrap(backbone, config, settings.warm_start))


def normalisations(backbone: Backbone) -> list[str]:
    """Last names of the modules that normalise. Raises ConfigError where there are none."""
    names = {
        path.rpartition(".")[2]
        for path, module in backbone.model.named_modules()
        if type(module).__name__.endswith(("Norm", "RMSNorm", "LayerNorm")) and any(True for _ in module.parameters())
    }
    if not names:
        raise ConfigError("the backbone has no normalisation with a scale: name adapter.target_modules")
    return sorted(names)
