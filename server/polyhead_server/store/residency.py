"""Which adapters hold a slot of the device pool, who needs them there, and which goes next. No torch, no files.

Life of a resident: begin (LOADING: slot and extents are its own, weights are on their way) -> finish (DEVICE) ->
publish (visible: requests may pin it) -> evict. Only residents that nobody pins are evicted, so a running step never
loses what it reads.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PROTECTION_S = 1.0
"""How long a resident that a request waits for stays, once visible, before that request must have pinned it."""


class Residency(enum.Enum):
    """Where the nearest copy of an adapter's weights is."""

    DISK = "disk"
    HOST = "host"
    LOADING = "loading"
    DEVICE = "device"


@dataclass(eq=False)
class Resident:
    content_hash: str
    slot: int
    starts: list[int]
    """The arena units where its extents start."""
    num_units: int
    state: Residency = Residency.LOADING
    visible: bool = False
    """In the tables since the last step boundary; only then may a request pin it."""
    request_pins: int = 0
    awaited: bool = False
    """A request asked for it and has not come back yet."""
    protected_until_s: float = 0.0


class ResidencyTable:
    """Not thread-safe: its owner has the lock."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free_slots = list(reversed(range(num_slots)))
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        """Least recently used first."""
        self._user_pinned: frozenset[str] = frozenset()
        self._unseen: dict[str, Resident] = {}
        """Finished and not yet visible: what a step has to look at, however many residents there are."""

    def __len__(self) -> int:
        return len(self._residents)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def get(self, content_hash: str) -> Resident | None:
        return self._residents.get(content_hash)

    @property
    def num_pins(self) -> int:
        return sum(resident.request_pins for resident in self)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def user_pinned(self) -> list[Resident]:
        """Residents that will never make room by themselves."""
        return [resident for resident in self if resident.content_hash in self._user_pinned]

    def set_user_pinned(self, content_hashes: Iterable[str]) -> None:
        self._user_pinned = frozenset(content_hashes)

    def begin(self, content_hash: str, starts: list[int], num_units: int, *, awaited: bool) -> Resident:
        assert content_hash not in self._residents, "already resident"
        resident = Resident(content_hash, self._free_slots.pop(), starts, num_units, awaited=awaited)
        self._residents[content_hash] = resident
        return resident

    def finish(self, content_hash: str) -> None:
        resident = self._residents[content_hash]
        assert resident.state is Residency.LOADING
        resident.state = Residency.DEVICE
        self._unseen[content_hash] = resident
        self._residents.move_to_end(content_hash)

    def publish(self, now_s: float) -> list[Resident]:
        """Makes finished residents visible; returns those that were not before."""
        new = list(self._unseen.values())
        self._unseen.clear()
        for resident in new:
            resident.visible = True
            resident.protected_until_s = now_s + PROTECTION_S
        return new

    def pin(self, content_hash: str) -> int:
        """Pins a visible resident for one request; returns its slot."""
        resident = self._residents[content_hash]
        assert resident.visible, "pinned before it is in the tables"
        resident.request_pins += 1
        resident.awaited = False
        self._residents.move_to_end(content_hash)
        return resident.slot

    def unpin(self, content_hash: str) -> bool:
        """Returns whether that was its last pin."""
        resident = self._residents[content_hash]
        assert resident.request_pins > 0, "released more often than acquired"
        resident.request_pins -= 1
        self._residents.move_to_end(content_hash)
        return resident.request_pins == 0

    def evictable(self, now_s: float) -> list[Resident]:
        """Residents that may go now, the least recently used first."""
        return [resident for resident in self if self._may_go(resident, now_s)]

    def _may_go(self, resident: Resident, now_s: float) -> bool:
        # Without the protection two adapters that want the same room would evict each other before either is used.
        protected = resident.awaited and (not resident.visible or now_s < resident.protected_until_s)
        needed = resident.request_pins > 0 or resident.content_hash in self._user_pinned
        return resident.state is Residency.DEVICE and not protected and not needed

    def drop(self, content_hash: str) -> Resident:
        """Frees the slot. Eviction, an unload, or a load that failed; the caller frees the extents."""
        resident = self._residents.pop(content_hash)
        assert resident.request_pins == 0, "dropped while a request needs it"
        self._unseen.pop(content_hash, None)
        self._free_slots.append(resident.slot)
        return resident

    def check_integrity(self) -> None:
        slots = [resident.slot for resident in self]
        assert sorted(slots + self._free_slots) == list(range(self.num_slots)), "every slot is free or has one owner"
        for content_hash, resident in self._residents.items():
            assert resident.content_hash == content_hash
            assert resident.request_pins >= 0
            assert resident.state in (Residency.LOADING, Residency.DEVICE)
            assert not resident.visible or resident.state is Residency.DEVICE
            assert resident.visible or resident.request_pins == 0
            unseen = resident.state is Residency.DEVICE and not resident.visible
            assert unseen == (content_hash in self._unseen)
        assert self._unseen.keys() <= self._residents.keys()
