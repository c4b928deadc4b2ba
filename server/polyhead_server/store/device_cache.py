"""The device pool as a cache: room for an adapter found, its weights copied, its row published at a step boundary.

Joins the bookkeeping (slots and pins, units) with the tensors. Not thread-safe but for `write`: its owner has the lock.
"""

from __future__ import annotations

import time
from typing import Protocol

from polyhead_core.kernels.tables import UNIT
from polyhead_server.store.packing import PackedAdapter, TableRow
from polyhead_server.store.page_allocator import PageAllocator
from polyhead_server.store.pool import AdapterPool
from polyhead_server.store.residency import Residency, ResidencyTable, Resident


class StoreMetrics(Protocol):
    """What the store reports."""

    def adapter_loaded(self, seconds: float) -> None: ...
    def adapter_load_failed(self) -> None: ...
    def adapter_evicted(self) -> None: ...
    def adapter_pool(self, used_pages: int, total_pages: int) -> None: ...


class DeviceCache:
    def __init__(self, pool: AdapterPool, num_slots: int, metrics: StoreMetrics) -> None:
        self.pool = pool
        self.residents = ResidencyTable(num_slots)
        self.allocator = PageAllocator(pool.tables.arena.numel() // UNIT)
        self._metrics = metrics
        self._unpublished: dict[str, TableRow] = {}
        """Rows of residents whose weights are written, by content hash."""
        self._stale_slots: set[int] = set()
        """Given up since the last step boundary: their rows are still in the tables, and nobody reads them."""
        self._report()

    @property
    def num_units(self) -> int:
        return self.allocator.num_units

    def could_ever_fit(self, sizes: list[int]) -> bool:
        return PageAllocator(self.num_units).can_fit(sizes)

    def user_pins_bar(self, adapter: PackedAdapter) -> bool:
        """Whether there will be no room for `adapter` until its users unpin another, whatever requests let go."""
        pinned = self.residents.user_pinned()
        units = sum(resident.num_units for resident in pinned)
        too_many = len(pinned) == self.residents.num_slots or units + adapter.num_units > self.num_units
        return too_many or len(pinned) == len(self.residents)

    def make_room(self, adapter: PackedAdapter, *, awaited: bool) -> Resident | None:
        """Takes a slot and extents for `adapter`, at the expense of residents that nobody needs; None: no room now."""
        victims = self.residents.evictable(time.monotonic())
        idle_units = sum(victim.num_units for victim in victims)
        if self.allocator.used_units - idle_units + adapter.num_units > self.num_units:
            return None  # and nothing evicted in vain
        if not self.residents.has_free_slot and not victims:
            return None
        starts = self._allocate(adapter) if self.residents.has_free_slot else None
        for victim in victims:
            if starts is not None:
                break
            self.give_up(victim.content_hash)
            self._metrics.adapter_evicted()
            starts = self._allocate(adapter)
        if starts is None:
            return None
        self._report()
        return self.residents.begin(adapter.content_hash, starts, adapter.num_units, awaited=awaited)

    def _allocate(self, adapter: PackedAdapter) -> list[int] | None:
        return self.allocator.allocate(adapter.sizes)

    def write(self, adapter: PackedAdapter, resident: Resident) -> TableRow:
        """Copies the weights into the resident's extents. Needs no lock: nobody else knows of them yet."""
        return self.pool.write(adapter, resident.starts)

    def finish(self, content_hash: str, row: TableRow) -> None:
        self.residents.finish(content_hash)
        self._unpublished[content_hash] = row

    def publish(self) -> None:
        """Between two steps: the tables come to show what has been loaded and given up since."""
        for slot in self._stale_slots:
            self.pool.clear_row(slot)
        self._stale_slots.clear()
        for resident in self.residents.publish(time.monotonic()):
            self.pool.set_row(resident.slot, self._unpublished.pop(resident.content_hash))

    def give_up(self, content_hash: str) -> None:
        """Frees slot and extents of a resident that no request pins."""
        resident = self.residents.drop(content_hash)
        self.allocator.free(resident.starts)
        self._unpublished.pop(content_hash, None)
        if resident.visible:
            self._stale_slots.add(resident.slot)
        self._report()

    def _report(self) -> None:
        self._metrics.adapter_pool(self.allocator.used_units, self.num_units)

    def check_integrity(self) -> None:
        self.residents.check_integrity()
        self.allocator.check_integrity()
        starts = [start for resident in self.residents for start in resident.starts]
        assert len(starts) == len(set(starts)) == self.allocator.num_extents, "every extent has one owner"
        assert sum(resident.num_units for resident in self.residents) == self.allocator.used_units
        written = {r.content_hash for r in self.residents if r.state is Residency.DEVICE and not r.visible}
        assert written == self._unpublished.keys(), "exactly the written residents wait for their row"
        visible = {resident.slot for resident in self.residents if resident.visible}
        assert not visible & self._stale_slots
        assert self.pool.rows_in_use() <= visible | self._stale_slots, "a slot that is nobody's has a row"
