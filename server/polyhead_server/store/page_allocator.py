"""Which units of the adapter arena are taken, by number alone. Knows no tensor and no adapter.

Extents of one size share slabs. A slab is a run of chunks that is cut from the arena when a size first needs it and
given back when its last extent goes, so adapters of different target modules share one memory without a static
partition. Giving everything back always leads to the same empty arena: what fits an empty arena fits again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

CHUNK_UNITS = 256
"""Slabs are whole chunks."""
_MAX_WASTE = 1 / 16
_MAX_SLAB_CHUNKS = 16


@dataclass(eq=False)
class _Slab:
    start: int
    """First unit."""
    num_chunks: int
    extent_units: int
    capacity: int
    free: list[int] = field(default_factory=list)
    """Starts of the extents that are not taken."""

    @property
    def is_empty(self) -> bool:
        return len(self.free) == self.capacity


@cache
def slab_chunks(extent_units: int) -> int:
    """Chunks in a slab for extents of this size: the fewest that waste at most a sixteenth, if 16 chunks can."""
    fewest = -(-extent_units // CHUNK_UNITS)
    candidates = range(fewest, max(fewest, _MAX_SLAB_CHUNKS) + 1)

    def waste(num_chunks: int) -> float:
        return (num_chunks * CHUNK_UNITS % extent_units) / (num_chunks * CHUNK_UNITS)

    return next((n for n in candidates if waste(n) <= _MAX_WASTE), min(candidates, key=waste))


class PageAllocator:
    """Hands out extents of an arena of `num_units` units. Not thread-safe: its owner has the lock."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self.used_units = 0
        """Units of the extents handed out, without what slabs hold in reserve."""
        self._num_chunks = num_units // CHUNK_UNITS
        self._free_runs: list[tuple[int, int]] = [(0, self._num_chunks)] if self._num_chunks else []
        """(first chunk, number) of every free run, by place, no two touching."""
        self._partial: dict[int, dict[int, _Slab]] = {}
        """By extent size: the slabs with room, by their start."""
        self._slab_of_chunk: dict[int, _Slab] = {}
        """Every chunk of every slab."""

    @property
    def num_extents(self) -> int:
        slabs = {id(slab): slab for slab in self._slab_of_chunk.values()}
        return sum(slab.capacity - len(slab.free) for slab in slabs.values())

    def allocate(self, sizes: Sequence[int]) -> list[int] | None:
        """Starts of one extent for each size in units, in order; None, and nothing taken, if they do not all fit."""
        counts = Counter(sizes)
        new_slabs = self._cut_slabs(counts)
        if new_slabs is None:
            return None
        for slab in new_slabs:
            self._partial.setdefault(slab.extent_units, {})[slab.start] = slab
        # In order of their places: what is read one behind the other lies so too, where the arena is not in pieces.
        starts_by_size = {size: iter(self._take(size, count)) for size, count in counts.items()}
        self.used_units += sum(size * count for size, count in counts.items())
        return [next(starts_by_size[size]) for size in sizes]

    def can_fit(self, sizes: Sequence[int]) -> bool:
        """Whether `allocate` would succeed now."""
        slabs = self._cut_slabs(Counter(sizes))
        for slab in slabs or ():
            self._give_back(slab)
        return slabs is not None

    def free(self, starts: Sequence[int]) -> None:
        """Takes back extents that `allocate` handed out."""
        for start in reversed(starts):  # the last one that is given back is the first to be taken again
            slab = self._slab_of_chunk[start // CHUNK_UNITS]
            assert (start - slab.start) % slab.extent_units == 0, f"no extent starts at unit {start}"
            assert start not in slab.free, f"the extent at unit {start} is not taken"
            slab.free.append(start)
            self.used_units -= slab.extent_units
            if slab.is_empty:
                self._unlist(slab)
                self._give_back(slab)
            elif len(slab.free) == 1:
                self._partial.setdefault(slab.extent_units, {})[slab.start] = slab

    def _cut_slabs(self, counts: Counter[int]) -> list[_Slab] | None:
        """The slabs that are missing for so many extents of each size; None, and none cut, if there is no room."""
        slabs: list[_Slab] = []
        # The longest runs first: they are the hardest to place.
        for size, count in sorted(counts.items(), reverse=True):
            assert size > 0, "an extent has at least one unit"
            missing = count - sum(len(slab.free) for slab in self._partial.get(size, {}).values())
            while missing > 0:
                slab = self._cut_slab(size)
                if slab is None:
                    for cut in slabs:
                        self._give_back(cut)
                    return None
                slabs.append(slab)
                missing -= slab.capacity
        return slabs

    def _cut_slab(self, extent_units: int) -> _Slab | None:
        num_chunks = slab_chunks(extent_units)
        index = next((i for i, (_, length) in enumerate(self._free_runs) if length >= num_chunks), None)
        if index is None:
            return None
        first, length = self._free_runs[index]
        if length == num_chunks:
            del self._free_runs[index]
        else:
            self._free_runs[index] = (first + num_chunks, length - num_chunks)
        start, capacity = first * CHUNK_UNITS, num_chunks * CHUNK_UNITS // extent_units
        free = [start + i * extent_units for i in reversed(range(capacity))]
        slab = _Slab(start, num_chunks, extent_units, capacity, free)
        for chunk in range(first, first + num_chunks):
            self._slab_of_chunk[chunk] = slab
        return slab

    def _give_back(self, slab: _Slab) -> None:
        first, length = slab.start // CHUNK_UNITS, slab.num_chunks
        for chunk in range(first, first + length):
            del self._slab_of_chunk[chunk]
        index = bisect.bisect(self._free_runs, (first, 0))
        if index < len(self._free_runs) and self._free_runs[index][0] == first + length:
            length += self._free_runs.pop(index)[1]
        if index > 0 and sum(self._free_runs[index - 1]) == first:
            index -= 1
            before, before_length = self._free_runs.pop(index)
            first, length = before, before_length + length
        self._free_runs.insert(index, (first, length))

    def _take(self, size: int, count: int) -> list[int]:
        taken: list[int] = []
        partial = self._partial[size]
        while len(taken) < count:
            slab = next(iter(partial.values()))
            taken += [slab.free.pop() for _ in range(min(count - len(taken), len(slab.free)))]
            if not slab.free:
                self._unlist(slab)
        return taken

    def _unlist(self, slab: _Slab) -> None:
        partial = self._partial.get(slab.extent_units, {})
        partial.pop(slab.start, None)
        if not partial:
            self._partial.pop(slab.extent_units, None)

    def check_integrity(self) -> None:
        slabs = {id(slab): slab for slab in self._slab_of_chunk.values()}.values()
        covered = [range(first, first + length) for first, length in self._free_runs]
        covered += [range(s.start // CHUNK_UNITS, s.start // CHUNK_UNITS + s.num_chunks) for s in slabs]
        chunks = sorted(chunk for run in covered for chunk in run)
        assert chunks == list(range(self._num_chunks)), "slabs and free runs must tile the arena"
        for (first, length), (following, _) in zip(self._free_runs, self._free_runs[1:], strict=False):
            assert first + length < following, "free runs must be ordered and joined"
        for slab in slabs:
            assert not slab.is_empty, "an empty slab must be given back"
            assert len(set(slab.free)) == len(slab.free) <= slab.capacity
            assert all(
                (start - slab.start) % slab.extent_units == 0
                and 0 <= (start - slab.start) // slab.extent_units < slab.capacity
                for start in slab.free
            )
            listed = self._partial.get(slab.extent_units, {}).get(slab.start) is slab
            assert listed == bool(slab.free), "exactly the slabs with room are listed"
        assert sum(map(len, self._partial.values())) == sum(bool(slab.free) for slab in slabs)
        taken = sum((slab.capacity - len(slab.free)) * slab.extent_units for slab in slabs)
        assert taken == self.used_units, f"{taken} units are taken, {self.used_units} are counted"
