"""Bottleneck adapters: small two-layer networks behind a decoder layer's parts (Houlsby et al. 2019).

    y = x + up(activation(down(x))), x what the feed-forward or attention part adds

`up` starts at zero, so that a fresh adapter changes nothing. peft has no such type, and none of its methods computes
it; the two files are peft's in form, with the type BOTTLENECK: adapter_config.json names size, activation and places,
adapter_model.safetensors holds `base_model.model.<path of the part>.bottleneck.{down,up}.{weight,bias}` in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, read_adapter_directory, stamp_backbone
from polyhead_core.backbone import Backbone
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, BackboneError
from polyhead_trainer.backbones import HUB_NAMES, check_trained_on
from polyhead_trainer.config import BottleneckSettings
from polyhead_trainer.decoder_layers import require_transformer_layers
from polyhead_trainer.heads import without_scores
from polyhead_trainer.methods.peft_tuned import HINT, check_same_tensors, task_type
from polyhead_trainer.methods.tuned import TrainedAtOneRate

BOTTLENECK_TYPE = "BOTTLENECK"
PREFIX = "base_model.model."
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_ATTENTION = ("self_attn", "self_attention", "attention", "attn")


class Bottleneck(nn.Module):
    def __init__(self, hidden: int, size: int, activation: str, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, size, device=device)
        self.up = nn.Linear(size, hidden, device=device)
        self.enabled = True
        self._activation = ACTIVATIONS[activation]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        inner = self._activation(self.down(x.to(self.down.weight.dtype)))
        change: Tensor = self.up(inner)
        return x + change.to(x.dtype)


@dataclass
class BottleneckTuned(TrainedAtOneRate):
    """Implements Tuned."""

    model: PreTrainedModel
    config: dict[str, Any]
    is_adapter: bool = True

    @contextmanager
    def baseline(self) -> Iterator[None]:
        added = _bottlenecks(self.model).values()
        score = getattr(self.model, "score", None)
        for module in added:
            module.enabled = False
        try:
            with nullcontext() if score is None else without_scores(score):
                yield
        finally:
            for module in added:
                module.enabled = True

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        (directory / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(self.model).items()}
        safetensors.torch.save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        return stamp_backbone(directory, fingerprint=fingerprint, quantization=quantization)


def bottleneck(backbone: Backbone, settings: BottleneckSettings) -> BottleneckTuned:
    """Raises BackboneError for layers whose parts are not found; with a warm start, AdapterRejected and its kin."""
    config = {
        "peft_type": BOTTLENECK_TYPE,
        "task_type": task_type(backbone.model),
        "base_model_name_or_path": HUB_NAMES.get(backbone.source, backbone.source),
        "size": settings.size,
        "activation": settings.activation,
        "places": settings.places,
        "inference_mode": True,
    }
    _insert(backbone.model, settings)
    if settings.warm_start is not None:
        files = read_adapter_directory(settings.warm_start.resolve())
        check_trained_on(backbone, settings.warm_start, files.backbone_fingerprint)
        if files.config.get("activation") != settings.activation:
            raise AdapterMismatch(
                f"{settings.warm_start} has activation = {files.config.get('activation')}, where the settings make it "
                f"{settings.activation}; {HINT}"
            )
        _fill(backbone.model, files.tensors, settings.warm_start)
    for module in _bottlenecks(backbone.model).values():
        module.requires_grad_(True)
    if isinstance(getattr(backbone.model, "score", None), nn.Module):
        backbone.model.score.requires_grad_(True)
    return BottleneckTuned(backbone.model, config)


def load_bottleneck(backbone: Backbone, directory: Path) -> PreTrainedModel:
    """The backbone with the adapter from `directory`. Raises AdapterRejected and its kin, BackboneError."""
    files = read_adapter_directory(directory.resolve())
    check_trained_on(backbone, directory, files.backbone_fingerprint)
    wanted = ("size", "activation", "places")
    try:
        settings = BottleneckSettings(method="bottleneck", **{name: files.config[name] for name in wanted})
    except (KeyError, ValueError) as error:
        raise AdapterFormatError(
            f"adapter {files.name!r}: {CONFIG_FILE} must name {', '.join(wanted)} of a bottleneck: {error}"
        ) from error
    _insert(backbone.model, settings)
    _fill(backbone.model, files.tensors, directory)
    backbone.model.eval().requires_grad_(False)
    return backbone.model


def _insert(model: PreTrainedModel, settings: BottleneckSettings) -> None:
    hidden = int(model.config.get_text_config().hidden_size)
    device = next(model.parameters()).device
    for layer in require_transformer_layers(model, "adapter.method = bottleneck"):
        parts = [_part(layer, _FEED_FORWARD)]
        if settings.places == "both":
            parts.append(_part(layer, _ATTENTION))
        for part in parts:
            part.bottleneck = Bottleneck(hidden, settings.size, settings.activation, device)
            part.register_forward_hook(_through_bottleneck)


def _part(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise BackboneError(
        f"adapter.method = bottleneck looks for a part named {' or '.join(names)} in each layer; "
        f"{type(layer).__name__} has {', '.join(children)}: use another method"
    )


def _through_bottleneck(part: nn.Module, _: Any, output: Any) -> Any:
    """Some parts return a tuple, whose first entry is the hidden state."""
    own: Any = part.bottleneck
    return (own(output[0]), *output[1:]) if isinstance(output, tuple) else own(output)


def _bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds, by the names there."""
    modules: dict[str, nn.Module] = {**_bottlenecks(model)}
    score = getattr(model, "score", None)
    if isinstance(score, nn.Module):
        modules["score"] = score
    return {
        f"{PREFIX}{path}.{name}": tensor.detach()
        for path, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


@torch.no_grad()
def _fill(model: nn.Module, given: dict[str, Tensor], origin: Path) -> None:
    wanted = _tensors(model)
    check_same_tensors(origin, given, wanted)
    for name, tensor in wanted.items():
        tensor.copy_(given[name])
