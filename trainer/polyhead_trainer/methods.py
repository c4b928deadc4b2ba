"""The kinds of adapters, as peft makes them. One function per method, one registry line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.backbones import HUB_NAMES
from polyhead_trainer.config import AdapterSection


def wrap(backbone: Backbone, settings: AdapterSection, seed: int) -> PeftModel:
    """Puts a fresh adapter on the backbone, in place; only the adapter is trainable. Raises ConfigError."""
    torch.manual_seed(seed)
    model = METHODS[settings.method](backbone, settings)
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32, (
            f"{name} is trained in {parameter.dtype}"
        )
    return model


def _lora(backbone: Backbone, settings: AdapterSection) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(backbone, settings),
        layers_to_transform=settings.layers,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        # A tied head shares its weight with the embedding, and the update of one is not the other's.
        ensure_weight_tying=False,
    )
    try:
        model = get_peft_model(backbone.model, config)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"peft refuses the [adapter] settings: {error}") from error
    model.peft_config["default"].base_model_name_or_path = HUB_NAMES.get(backbone.source, backbone.source)
    return cast(PeftModel, model)


def _targets(backbone: Backbone, settings: AdapterSection) -> str | list[str]:
    if settings.target_modules != "all-linear":
        return settings.target_modules
    head = backbone.model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(linear)


METHODS: dict[str, Callable[[Backbone, AdapterSection], PeftModel]] = {"lora": _lora}
