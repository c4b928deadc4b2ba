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

    T is the padded length, as in transformers' Trainer; in a packed row it is each example's own. alpha = 0: no noise,
    and no random number drawn.
    """
    if alpha == 0:
        yield
        return
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    packed: list[int] = []

    def note_packing(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        packed[:] = arguments.get("example_lengths", ())

    def add_noise(module: nn.Module, _: Any, embedded_BTH: Tensor) -> Tensor:
        if not module.training:
            return embedded_BTH
        lengths = torch.tensor(packed or embedded_BTH.shape[-2:-1], device=embedded_BTH.device)
        bound_T1 = alpha / (lengths.repeat_interleave(lengths) * embedded_BTH.shape[-1]).sqrt().unsqueeze(-1)
        return embedded_BTH + torch.empty_like(embedded_BTH).uniform_(-1, 1) * bound_T1.to(embedded_BTH.dtype)

    handles = [
        model.register_forward_pre_hook(note_packing, with_kwargs=True),
        table.register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
