"""One step's flattened batch as tensors: what the attention and the sites need to know of the rows.

Shapes: T tokens of all rows in a line, S sequences, M blocks of the longest one, L positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.kvcache.pool import KVPool


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """A piece of one sequence: `token_ids` at positions start, start + 1, ... whose KV goes into `block_ids`."""

    token_ids: SequenceOf[int]
    start: int
    block_ids: SequenceOf[int]
    slot: int
    """Adapter slot; -1: none."""
    key_offset: int = 0
    """The place of position 0 in `block_ids`: pages that the row shares with others end with a block, see
    kernels/reference.py:paged_attention."""
    num_logits: int = 1
    """Logits are wanted at this many of the last positions."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The rows stand sorted by adapter slot; their logits come in the order in which they were handed over."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    sequence: Tensor  # [T] int32: row of block_tables
    block_tables: Tensor  # [S, M] int32
    key_offsets: Tensor  # [S] int32: the place of position 0 in the sequence's blocks
    slot_mapping: Tensor  # [T] int64: block * block_size + offset
    adapter_slots: Tensor  # [T] int32: -1 none
    logit_rows: Tensor  # [L] int64: indices into T
    logit_slots: Tensor  # [L] int32: adapter_slots at logit_rows
    active_sites: frozenset[int]
    """Sites at which some adapter of this batch acts; all others are skipped."""
    tables: AdapterTables
    kv: KVPool
    flat: Tensor | None = None
    """The memory of all tensors, where they lie in one piece."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device) -> StepBatch:
        """The batch on the device; itself where that is the CPU."""
        return self if device.type == "cpu" else self.in_one_piece(device)

    def in_one_piece(self, device: torch.device) -> StepBatch:
        """A copy on the device whose tensors lie one behind the other: they all come there in one transfer."""
        flat = torch.empty_like(host := self._bytes(device), device=device)
        flat.copy_(host, non_blocking=True)
        views: dict[str, Any] = {}
        for name, place in self._places():
            tensor: Tensor = getattr(self, name)
            views[name] = flat[place].view(tensor.dtype).view(tensor.shape)
        return replace(self, **views, flat=flat)

    def take_over(self, host: StepBatch) -> None:
        """Writes the numbers of a batch of the same shapes over those of this one, which lies in one piece."""
        assert self.flat is not None
        self.flat.copy_(host._bytes(self.flat.device), non_blocking=True)

    def _bytes(self, device: torch.device) -> Tensor:
        """Of all tensors, on the host, from where the device can fetch them by itself."""
        places = self._places()
        flat = torch.empty(_aligned(places[-1][1].stop), dtype=torch.uint8, pin_memory=device.type == "cuda")
        for name, place in places:
            flat[place] = getattr(self, name).reshape(-1).view(torch.uint8)
        return flat

    def _places(self) -> list[tuple[str, slice]]:
        """Where the bytes of each tensor lie in one piece."""
        places, begin = [], 0
        for name in _TENSORS:
            end = begin + getattr(self, name).nbytes
            places.append((name, slice(begin, end)))
            begin = _aligned(end)
        return places


_TENSORS = (
    "token_ids", "positions", "slot_mapping", "logit_rows", "sequence", "block_tables", "key_offsets", "adapter_slots",
    "logit_slots",
)  # fmt: skip


def _aligned(num_bytes: int) -> int:
    """Up to a multiple of 16: for a pointer that is none Triton would compile a kernel once more, while serving."""
    return -(-num_bytes // 16) * 16


def build_batch(rows: SequenceOf[BatchRow], tables: AdapterTables, kv: KVPool) -> StepBatch:
    """Lays `rows` out in a line, on the host, sorted by adapter slot; their logits come in the order of `rows`.

    So the rows of an adapter stand together, which kernels for many rows make use of (triton/low_rank.py); of what is
    computed for a row it changes no bit.
    """
    block_size = kv.shape.block_size
    tokens: list[int] = []
    positions: list[int] = []
    sequence: list[int] = []
    slot_mapping: list[int] = []
    slots: list[int] = []
    logits_of = [range(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: rows[index].slot)
    for place, index in enumerate(order):
        row = rows[index]
        tokens.extend(row.token_ids)
        span = range(row.start, row.start + len(row.token_ids))
        positions.extend(span)
        sequence.extend([place] * len(span))
        slots.extend([row.slot] * len(span))
        places = range(span.start + row.key_offset, span.stop + row.key_offset)
        slot_mapping.extend(row.block_ids[at // block_size] * block_size + at % block_size for at in places)
        logits_of[index] = range(len(tokens) - row.num_logits, len(tokens))
    logit_rows = [at for positions_of_row in logits_of for at in positions_of_row]
    width = max(len(row.block_ids) for row in rows)
    block_tables = [[*rows[index].block_ids, *[0] * (width - len(rows[index].block_ids))] for index in order]

    # By way of NumPy, which takes a list of numbers in a fifth of torch's time.
    def int32(values: object) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int32))

    def int64(values: object) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64))

    return StepBatch(
        token_ids=int64(tokens),
        positions=int64(positions),
        sequence=int32(sequence),
        block_tables=int32(block_tables),
        key_offsets=int32([rows[index].key_offset for index in order]),
        slot_mapping=int64(slot_mapping),
        adapter_slots=int32(slots),
        logit_rows=int64(logit_rows),
        logit_slots=int32([slots[at] for at in logit_rows]),
        active_sites=_active_sites({row.slot for row in rows} - {-1}, tables),
        tables=tables,
        kv=kv,
    )


def _active_sites(slots: set[int], tables: AdapterTables) -> frozenset[int]:
    if not slots:
        return frozenset()
    # Through numpy, whose small operations cost a tenth of torch's.
    return frozenset(np.flatnonzero(tables.acts.numpy()[sorted(slots)].any(axis=0)).tolist())
