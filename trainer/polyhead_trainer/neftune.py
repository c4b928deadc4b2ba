"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float) -> Iterator[None]:
    """Inside the block, a model in training mode sees embeddings + u alpha / sqrt(T H), u uniform in -1..1.

    T is the padded length, as in transformers' Trainer. alpha = 0: no noise, and no random number drawn.
    """
    if alpha == 0:
        yield
        return
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def add_noise(module: nn.Module, _: Any, embedded_BTH: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTH
        bound = alpha / (embedded_BTH.shape[-2] * embedded_BTH.shape[-1]) ** 0.5
        return embedded_BTH + torch.empty_like(embedded_BTH).uniform_(-bound, bound)

    handle = table.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
