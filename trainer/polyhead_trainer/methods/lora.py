"""LoRA and its relatives, by peft: rsLoRA, DoRA, LoRA+, PiSSA, OLoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.methods.peft_tuned import PeftTuned, stamp, task_type, wrap
from polyhead_trainer.methods.tuned import at_one_rate, trained_parameters
from polyhead_trainer.parallel import held_as, reshard


@dataclass
class LoraTuned(PeftTuned):
    lora_plus_ratio: float = 1.0

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        if self.lora_plus_ratio == 1.0:
            return super().parameter_groups(settings)
        slow: dict[str, nn.Parameter] = {}
        fast: dict[str, nn.Parameter] = {}
        for name, parameter in trained_parameters(self.model).items():
            (fast if "lora_B" in name or "lora_embedding_B" in name else slow)[name] = parameter
        rate = settings.learning_rate
        return [*at_one_rate(slow, rate, settings), *at_one_rate(fast, rate * self.lora_plus_ratio, settings)]


@dataclass
class ResidualTuned(LoraTuned):
    """LoRA whose initialisation took its part out of the backbone's weights (PiSSA, OLoRA).

    Without the adapter the backbone would lack that part: the baseline is the model with the initial adapter, equal to
    the untouched backbone up to rounding. Saved as the change since then, a plain LoRA of twice the rank.
    """

    initial: dict[str, Tensor] = field(default_factory=dict)
    """Whole on every rank."""

    @contextmanager
    def baseline(self) -> Iterator[None]:
        trained = {name: tensor.clone() for name, tensor in self.trained_state().items()}
        self._set(self.initial)
        try:
            yield
        finally:
            self._set(trained)

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        trained = {name: tensor.clone() for name, tensor in self.trained_state().items()}
        config: Any = self.model.peft_config["default"]
        init = config.init_lora_weights
        with tempfile.TemporaryDirectory() as initial:
            self._set(self.initial)
            config.init_lora_weights = True
            self.model.save_pretrained(initial, save_embedding_layers=False)
            self._set(trained)
            config.init_lora_weights = init
            self.model.save_pretrained(
                str(directory), save_embedding_layers=False, path_initial_model_for_weight_conversion=initial
            )
        return stamp(directory, fingerprint=fingerprint, quantization=quantization)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        reshard(self.model)
        for name, parameter in trained_parameters(self.model).items():
            parameter.copy_(held_as(parameter, values[name]))


def lora(backbone: Backbone, settings: LoraSettings) -> LoraTuned:
    _check(backbone, settings)
    config = LoraConfig(
        task_type=task_type(backbone.model),
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(backbone, settings),
        layers_to_transform=settings.layers,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init == "default" else settings.init,
        # A tied head shares its weight with the embedding, and the update of one is not the other's.
        ensure_weight_tying=False,
    )
    model = wrap(backbone, config, settings.warm_start)
    if settings.init in ("pissa", "olora"):
        initial = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
        if any("lora_embedding_" in name for name in initial):
            raise ConfigError(
                f"adapter.init = {settings.init} on an embedding: peft leaves it out of what it saves then; name "
                "linear layers alone in adapter.target_modules"
            )
        return ResidualTuned(model, lora_plus_ratio=settings.lora_plus_ratio, initial=initial)
    return LoraTuned(
        model, save_embedding_layers=settings.save_embedding_layers, lora_plus_ratio=settings.lora_plus_ratio
    )


def _check(backbone: Backbone, settings: LoraSettings) -> None:
    if settings.bias != "none" and backbone.quantization == "int8":
        raise ConfigError(
            f"adapter.bias = {settings.bias}: an int8 layer's bias is part of its product and has no gradient, so that "
            "nothing of it would be learned: set adapter.bias = none, or backbone.quantization = none"
        )
    if settings.init in ("pissa", "olora") and backbone.quantization != "none":
        raise ConfigError(
            f"adapter.init = {settings.init} takes its part out of the backbone's weights, which "
            f"{backbone.quantization} cannot hold: set backbone.quantization = none, or adapter.init = default"
        )
    if settings.use_dora and backbone.quantization == "llm.int8" and backbone.device.type == "cpu":
        raise ConfigError(
            "adapter.use_dora = true fails on bitsandbytes' int8 on the CPU: set backbone.quantization = int8 or none"
        )


def _targets(backbone: Backbone, settings: LoraSettings) -> str | list[str]:
    if settings.target_modules != "all-linear":
        return settings.target_modules
    head = backbone.model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "score" not in path.split(".")
    }
    if not linear:
        raise ConfigError(
            f"adapter.target_modules = all-linear: {type(backbone.model).__name__} keeps no layer as torch.nn.Linear "
            '(GPT-2 has Conv1D): name the layers, as in ["c_attn"]'
        )
    return sorted(linear)
