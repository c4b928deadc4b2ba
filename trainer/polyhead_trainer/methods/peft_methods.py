"""The methods that peft makes: one function per method, which returns peft's model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from polyhead_core.adapter_directory import stamp_backbone
from polyhead_core.backbone import Backbone
from polyhead_core.errors import AdapterMismatch, ConfigError
from polyhead_trainer.backbones import HUB_NAMES
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.methods.tuned import trained_parameters


@dataclass
class PeftTuned:
    """Implements Tuned."""

    model: PeftModel
    save_embedding_layers: bool = False
    is_adapter: bool = True

    @contextmanager
    def baseline(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        return [{"params": list(trained_parameters(self.model).values()), "lr": settings.learning_rate}]

    def trained_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        self.model.save_pretrained(str(directory), save_embedding_layers=self.save_embedding_layers)
        return stamp_backbone(directory, fingerprint=fingerprint, quantization=quantization)


def lora(backbone: Backbone, settings: LoraSettings) -> PeftTuned:
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
        # A tied head shares its weight with the embedding, and the update of one is not the other's.
        ensure_weight_tying=False,
    )
    try:
        model = get_peft_model(backbone.model, config)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"peft refuses the [adapter] settings: {error}") from error
    model.peft_config["default"].base_model_name_or_path = HUB_NAMES.get(backbone.source, backbone.source)
    return PeftTuned(cast(PeftModel, model), save_embedding_layers=settings.save_embedding_layers)


def task_type(model: nn.Module) -> str:
    """peft's name for what the model's output is; for a classifier peft trains and saves `score` as well."""
    if hasattr(model, "score"):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def reload_peft(backbone: Backbone, directory: Path) -> PeftModel:
    """The backbone with an adapter that peft reads. Raises AdapterMismatch."""
    try:
        return PeftModel.from_pretrained(backbone.model, str(directory))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterMismatch(f"peft cannot put {directory} on {backbone.source!r}: {error}") from error


def _targets(backbone: Backbone, settings: LoraSettings) -> str | list[str]:
    if settings.target_modules != "all-linear":
        return settings.target_modules
    head = backbone.model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "score" not in path.split(".")
    }
    return sorted(linear)
