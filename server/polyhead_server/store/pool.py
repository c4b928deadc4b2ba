"""The device memory of resident adapters: writes pages into the arena, and rows into the tables at step boundaries.

Knows no names and no policy; which units are free and which slot is whose, others say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyhead_core.errors import ConfigError
from polyhead_core.kernels import dispatch
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables
from polyhead_core.sites import SiteMap
from polyhead_server.store.packing import PackedAdapter, Run, TableRow, joined_extents, table_row


class AdapterPool:
    """Arena and tables. `write` may run beside a step, `set_row` and `clear_row` only between steps."""

    def __init__(
        self,
        sites: SiteMap,
        *,
        num_units: int,
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sites = sites
        self.max_pages = -(-max_rank // RANKS_PER_PAGE)
        shape = (num_slots, len(sites))
        try:
            # Zeros, and not empty: memory that was never written must not hold a NaN that 0 * NaN would spread.
            self.tables = AdapterTables(
                arena=dispatch.zeros_for_long(num_units * UNIT, dtype, device),
                num_pages=torch.zeros(shape, dtype=torch.int32, device=device),
                pages=torch.zeros(*shape, self.max_pages, 2, dtype=torch.int32, device=device),
                bias=torch.full(shape, -1, dtype=torch.int32, device=device),
                acts=torch.zeros(shape, dtype=torch.bool),
            )
        except RuntimeError as error:  # torch's for memory that is not there, on every device
            raise ConfigError(
                f"the adapter pool cannot be had on {device}: lower adapter_pool_bytes, or max_resident_adapters and"
                f" max_adapter_rank, by which its tables grow; {error}"
            ) from error
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]

    @property
    def unit_bytes(self) -> int:
        return UNIT * self.tables.arena.element_size()

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.arena.dtype

    @property
    def device(self) -> torch.device:
        return self.tables.arena.device

    def write(self, adapter: PackedAdapter, starts: Sequence[int]) -> TableRow:
        """Copies the adapter's extents to these units; returns its row of the tables.

        On the host no step may be reading the units. On CUDA one that is enqueued may: the copy waits for it.
        """
        runs = joined_extents(starts, adapter.sizes)
        if self._stream is None:
            self._copy_on_host(adapter, runs)
        else:
            # A step that only prefills is enqueued and never waited for; an adapter that it still reads may have been
            # evicted since. Steps run on the default stream, for which streams of torch's do not wait by themselves.
            self._stream.wait_stream(torch.cuda.default_stream(self.device))  # type: ignore[no-untyped-call, unused-ignore]
            with torch.cuda.stream(self._stream):
                self._copy_to_device(adapter, runs)
            self._stream.synchronize()
        return table_row(adapter, starts, self.sites, self.max_pages)

    def _copy_on_host(self, adapter: PackedAdapter, runs: Sequence[Run]) -> None:
        # Through numpy: plain memory copies, ten times as fast as torch's small copies, and no thread but this one.
        arena = self.tables.arena.view(torch.uint8).numpy().reshape(-1, self.unit_bytes)
        units = adapter.units.view(torch.uint8).numpy()
        for start, first, size in runs:
            arena[start : start + size] = units[first : first + size]

    def _copy_to_device(self, adapter: PackedAdapter, runs: Sequence[Run]) -> None:
        # From pinned memory straight to its place: an index of all units would take the host longer than these copies.
        arena = self.tables.arena.view(-1, UNIT)
        for start, first, size in runs:
            arena[start : start + size].copy_(adapter.units[first : first + size], non_blocking=True)

    def set_row(self, slot: int, row: TableRow) -> None:
        self.tables.num_pages[slot] = row.num_pages
        self.tables.pages[slot] = row.pages
        self.tables.bias[slot] = row.bias
        self.tables.acts[slot] = (row.num_pages > 0) | (row.bias >= 0)

    def clear_row(self, slot: int) -> None:
        self.tables.num_pages[slot] = 0
        self.tables.bias[slot] = -1
        self.tables.acts[slot] = False

    def rows_in_use(self) -> set[int]:
        """Slots with anything in the tables."""
        used = ((self.tables.num_pages > 0) | (self.tables.bias >= 0)).cpu()
        assert torch.equal(used, self.tables.acts), "the host knows which slots act where"
        used = used.any(dim=1)
        return set(used.nonzero().flatten().tolist())
