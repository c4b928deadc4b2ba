"""The processes of one run, as one of them sees them. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process alone by default: then nothing here communicates."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """Of this rank's tensors."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what exists once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part: every `size`-th, so that neighbours (of like length, in a batch) go to different ranks."""
        return list(items[self.rank :: self.size])

    def sum(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
