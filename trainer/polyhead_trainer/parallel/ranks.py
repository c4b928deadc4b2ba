"""The processes of one run, as one of them sees them. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from polyhead_core.errors import ConfigError

Item = TypeVar("Item")
CPU = torch.device("cpu")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By device. Checkpoints and lone numbers go through gloo in both."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process alone by default: then nothing here communicates."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    """Of this rank's computation."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what exists once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part: every `size`-th, so that neighbours (of like length, in a batch) go to different ranks."""
        return list(items[self.rank :: self.size])

    def rank_of(self, index: int) -> int:
        """In whose share the item at `index` is."""
        return index % self.size

    def sum(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(0.0)

    def from_main(self, item: Item) -> Item:
        """What the main rank gives; the others' items are not looked at."""
        if self.size == 1:
            return item
        shared = [item]
        dist.broadcast_object_list(shared, device=CPU)
        return shared[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What is inside is done by the main rank, then by the others: they find what it left."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextmanager
def joined(device: str, timeout_s: int, store: Store | None = None) -> Iterator[Ranks]:
    """This process among the others that RANK, WORLD_SIZE and LOCAL_RANK name, as torchrun sets them; alone without.

    They meet at `store`, or where torchrun's variables say. Raises ConfigError.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(device=torch.device(device))
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = torch.device(device)
    if own.type not in BACKENDS:
        raise ConfigError(f"backbone.device = {device}: several processes work on {' or '.join(BACKENDS)}")
    if own.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(f"rank {rank} has no GPU of its own: {torch.cuda.device_count()} are here")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        dist.init_process_group(BACKENDS[own.type], timeout=timeout)
    else:
        dist.init_process_group(BACKENDS[own.type], store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield Ranks(rank=rank, size=size, device=own)
    finally:
        dist.destroy_process_group()
