"""Activation checkpointing (Chen et al. 2016): a layer keeps its input alone and is computed again in backward.

The layers' forwards are wrapped while a training runs and are themselves again after it: parameter names, saved files
and the model's class do not change. torch's own checkpoint does the work, without re-entering autograd, so that layers
with frozen inputs (a LoRA's first one) get their gradients, and with the dropout's random state kept.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import Cache

from polyhead_trainer.config import TrainingSection
from polyhead_trainer.decoder_layers import require_transformer_layers, wrapped_forwards

_aten = torch.ops.aten
KEPT_BY_SELECTIVE = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""Costly to compute again; the rest of a layer (norms, rotary embedding, activation, dropout) is cheap. The products of
Int8Linear are no operators of torch's dispatcher, so that these are computed again under `selective` as well."""


@contextmanager
def activation_checkpointing(model: nn.Module, settings: TrainingSection) -> Iterator[None]:
    """Checkpoints every k-th layer of `model` inside the block. Raises ConfigError."""
    how = settings.activation_checkpointing
    if how == "none":
        yield
        return
    layers = require_transformer_layers(model, f"training.activation_checkpointing = {how}")
    wrap = functools.partial(_checkpointed, selective=how == "selective")
    with wrapped_forwards(layers[:: settings.activation_checkpointing_every], wrap):
        yield


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    more: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(_with_own_cache, forward, *args, use_reentrant=False, **more, **kwargs)

    return checkpointed


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(KEPT_BY_SELECTIVE)


def _with_own_cache(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A learned prefix comes as a KV cache, and a layer adds its keys to the cache that it is given: a second
    computation must find it as the first one did. (transformers' own checkpointing drops the cache, prefix and all.)"""
    # By its type: the argument's name differs between versions (`past_key_values`, `cache` since 5.24).
    own = {name: _copied(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return forward(*args, **own)


def _copied(cache: Cache) -> Cache:
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh
