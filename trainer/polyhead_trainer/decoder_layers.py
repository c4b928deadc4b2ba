"""Finds a model's transformer layers by structure: the repeated blocks that hold attention. Knows no architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from polyhead_core.errors import ConfigError

_ATTENTION_NAMES = ("attn", "attention")


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of every outermost list of blocks of one class with attention inside, in the order of the tree.

    An encoder-decoder gives both stacks. Lists inside of a layer (experts, say) are part of that layer.
    """
    found: list[nn.Module] = []
    _collect(model, found)
    return found


def require_transformer_layers(model: nn.Module, setting: str) -> list[nn.Module]:
    """Raises ConfigError, naming the setting that needs them, where there are none."""
    layers = transformer_layers(model)
    if not layers:
        raise ConfigError(f"{setting}: {type(model).__name__} has no list of layers with attention; leave it out")
    return layers


@contextmanager
def wrapped_forwards(
    layers: Sequence[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each layer computes by wrap(layer, its forward) inside the block, and as before after it."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = wrap(layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = forward


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    if isinstance(module, nn.ModuleList) and _is_stack(module):
        found.extend(module)
        return
    for child in module.children():
        _collect(child, found)


def _is_stack(modules: nn.ModuleList) -> bool:
    return len({type(module) for module in modules}) == 1 and all(map(_has_attention, modules))


def _has_attention(layer: nn.Module) -> bool:
    return any(word in name.lower() for name, _ in layer.named_modules() for word in _ATTENTION_NAMES)
