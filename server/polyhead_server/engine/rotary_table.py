"""Rotary cosines and sines of every position, computed once: a model's rotary module takes a dozen small operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOST_BYTES = 16 << 20
"""A longer table is not worth its memory: the models that need one take longer for a step."""


class RotaryTable:
    """Stands in the place of a rotary module for the positions [0, length)."""

    def __init__(self, cos_PD: Tensor, sin_PD: Tensor) -> None:
        self._tables = cos_PD, sin_PD

    def __call__(self, _: Tensor, *, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [1, T] -> cos, sin [1, T, D], of the type that the module gives."""
        cos, sin = (table.index_select(0, position_ids[0]).unsqueeze(0) for table in self._tables)
        return cos, sin

    @classmethod
    @torch.inference_mode()
    def of(cls, rotary: Any, hidden: Tensor, length: int) -> RotaryTable | None:
        """None where the table would be long, or where a position's values depend on the other positions.

        `hidden`: an input of the module, for its type and device.
        """

        def ask(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = rotary(hidden, position_ids=positions.unsqueeze(0))
            return cos[0], sin[0]

        some = torch.tensor([0, 1, length // 2, length - 1], device=hidden.device).clamp(max=length - 1)
        alone = [ask(position.unsqueeze(0)) for position in some]
        if 2 * length * alone[0][0].nbytes > _MOST_BYTES:
            return None
        tables = ask(torch.arange(length, device=hidden.device))
        for index, table in enumerate(tables):
            if not torch.equal(table[some], torch.cat([one[index] for one in alone])):
                return None
        return cls(*tables)
