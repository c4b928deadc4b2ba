"""Full and partial fine-tuning: a float backbone's own weights are trained, and the output is a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polyhead_core.adapter_directory import CONFIG_FILE
from polyhead_core.backbone import Backbone
from polyhead_core.backbone.checkpoint import compute_fingerprint
from polyhead_core.errors import BackboneError, ConfigError
from polyhead_trainer.config import FullSettings
from polyhead_trainer.methods.tuned import TrainedAtOneRate


@dataclass
class FullTuned(TrainedAtOneRate):
    """Implements Tuned. Its baseline is the model itself, and holds before the first step alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_adapter: bool = False

    @property
    def saves_frozen(self) -> bool:
        return True

    @contextmanager
    def baseline(self) -> Iterator[None]:
        yield

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        return compute_fingerprint(directory)


def is_whole_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and not (directory / CONFIG_FILE).is_file()


def load_whole_model(loader: Any, backbone: Backbone, directory: Path) -> PreTrainedModel:
    """What a full fine-tune left, by transformers' `loader`, in the backbone's type. Raises BackboneError."""
    try:
        model = loader.from_pretrained(directory, dtype=backbone.dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BackboneError(f"transformers cannot load {directory}: {error}") from error
    assert isinstance(model, PreTrainedModel)
    nn.Module.to(model, backbone.device)
    model.eval().requires_grad_(False)
    return model


def full(backbone: Backbone, settings: FullSettings) -> FullTuned:
    if backbone.quantization != "none" or backbone.dtype != torch.float32:
        raise ConfigError(
            f"adapter.method = full trains the backbone's own weights, and these are {backbone.quantization} in "
            f"{backbone.dtype_name}: set backbone.quantization = none and backbone.dtype = float32 (int8 has no "
            "gradients, and steps of a usual size are lost in bfloat16's rounding); for int8, train an adapter"
        )
    for module in [backbone.model] if settings.last_layers is None else last_layers(backbone, settings.last_layers):
        module.requires_grad_(True)
    return FullTuned(backbone.model, backbone.tokenizer)


def last_layers(backbone: Backbone, count: int) -> list[nn.Module]:
    """The last decoder layers, the norms after them, and a classifier's scores. Raises ConfigError, BackboneError."""
    model: Any = backbone.model
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    children = list(decoder.children())
    stacks = [child for child in children if isinstance(child, nn.ModuleList)]
    if len(stacks) != 1:
        raise BackboneError(
            f"adapter.last_layers: {type(decoder).__name__} has {len(stacks)} lists of layers, expected one"
        )
    (layers,) = stacks
    if count > len(layers):
        raise ConfigError(f"adapter.last_layers = {count}: the backbone has {len(layers)} layers")
    after = children[children.index(layers) + 1 :]
    score = [model.score] if hasattr(model, "score") else []
    return [*layers[-count:], *after, *score]
