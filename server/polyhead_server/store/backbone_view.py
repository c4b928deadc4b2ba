"""The loaded backbone as adapter readers see it: its sites, biases and weights, whatever module holds them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from polyhead_core.sites import SiteMap
from polyhead_server.adapters.base import BackboneView


class BackboneLike(Protocol):
    """The part of polyhead_core.backbone.Backbone that the store needs."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def sites(self) -> SiteMap: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def view_backbone(backbone: BackboneLike) -> BackboneView:
    model = backbone.model

    def base_bias(path: str) -> Tensor | None:
        bias = getattr(_module(model, path), "bias", None)
        return bias.detach().cpu() if isinstance(bias, Tensor) else None

    def same_weight(path: str, weight: Tensor) -> bool:
        module = _module(model, path)
        return module is not None and _holds(module, weight)

    def embed_scale(path: str) -> float:
        return float(getattr(_module(model, path), "embed_scale", 1.0))

    return BackboneView(
        sites=backbone.sites,
        fingerprint=backbone.fingerprint,
        quantization=backbone.quantization,
        base_bias=base_bias,
        same_weight=same_weight,
        embed_scale=embed_scale,
    )


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # also raised for a path that leads through a tensor
        return None


def _holds(module: nn.Module, weight_OI: Tensor) -> bool:
    held_OI = getattr(module, "weight", None)
    if not isinstance(held_OI, Tensor) or held_OI.shape != weight_OI.shape:
        return False
    dequantize = getattr(module, "dequantize", None)
    if dequantize is not None:
        # A fused layer's weights have gone elsewhere; PEFT saves no copies of them.
        return not module.is_released and _within_a_step(module, weight_OI.float(), dequantize().cpu())
    coarser = min(held_OI.dtype, weight_OI.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    return torch.equal(weight_OI.to(coarser), held_OI.detach().cpu().to(coarser))


def _within_a_step(module: nn.Module, weight_OI: Tensor, dequantized_OI: Tensor) -> bool:
    """An int8 layer cannot tell apart what lies within one step of it: absmax / 127 in its (smoothed) space."""
    step_OI = (module.SCB.detach().cpu() / 127.0).unsqueeze(1)  # type: ignore[operator]
    input_scale = getattr(module, "input_scale", None)
    if input_scale is not None:
        step_OI = step_OI / input_scale.detach().cpu()
    return bool(((weight_OI - dequantized_OI).abs() <= step_OI).all())
