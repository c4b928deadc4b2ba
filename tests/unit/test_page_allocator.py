"""The arena's bookkeeping: random histories checked against a plain list of taken ranges."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead_server.store.packing import joined_extents
from polyhead_server.store.page_allocator import CHUNK_UNITS, PageAllocator, slab_chunks

_SIZES = st.lists(st.sampled_from([1, 3, 8, 24, 72, 192, 300, 700, 6144]), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(num_chunks=st.integers(1, 60), history=st.lists(st.tuples(_SIZES, st.booleans(), st.randoms()), max_size=25))
def test_random_histories(num_chunks: int, history: list[tuple[list[int], bool, random.Random]]) -> None:
    allocator = PageAllocator(num_chunks * CHUNK_UNITS + 17)
    held: list[tuple[list[int], list[int]]] = []
    for sizes, release_first, rng in history:
        if release_first and held:
            starts, _ = held.pop(rng.randrange(len(held)))
            allocator.free(starts)
            allocator.check_integrity()
        before = allocator.used_units
        expected = allocator.can_fit(sizes)
        allocator.check_integrity()
        starts_or_none = allocator.allocate(sizes)
        assert (starts_or_none is not None) == expected
        if starts_or_none is None:
            assert allocator.used_units == before
        else:
            held.append((starts_or_none, sizes))
        allocator.check_integrity()
        ranges = sorted((start, start + size) for s, z in held for start, size in zip(s, z, strict=True))
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges)), "extents overlap"
        assert not ranges or ranges[-1][1] <= allocator.num_units
        assert allocator.used_units == sum(end - start for start, end in ranges)
        assert allocator.num_extents == len(ranges)
    for starts, _ in held:
        allocator.free(starts)
    allocator.check_integrity()
    assert allocator.used_units == 0
    assert allocator.can_fit([num_chunks * CHUNK_UNITS]), "an emptied arena is one free run again"


@settings(max_examples=100, deadline=None)
@given(first=_SIZES, second=_SIZES)
def test_what_fits_an_empty_arena_fits_again(first: list[int], second: list[int]) -> None:
    allocator = PageAllocator(64 * CHUNK_UNITS)
    expected = PageAllocator(64 * CHUNK_UNITS).can_fit(second)
    starts = allocator.allocate(first)
    if starts is not None:
        allocator.free(starts)
    assert (allocator.allocate(second) is not None) == expected


@pytest.mark.parametrize("size", [8, 24, 72, 96, 192, 256, 320, 384, 512, 1024, 1376, 1792, 6144, 16_384, 32_768])
def test_slabs_waste_little_on_sizes_of_real_backbones(size: int) -> None:
    num_chunks = slab_chunks(size)
    assert num_chunks * CHUNK_UNITS % size / (num_chunks * CHUNK_UNITS) <= 1 / 16


def test_one_adapter_shape_after_another_without_a_static_partition() -> None:
    allocator = PageAllocator(100 * CHUNK_UNITS)
    attention, feed_forward = [72] * 330, [192] * 128
    for _ in range(3):
        for shape in (attention, feed_forward):
            starts = allocator.allocate(shape)
            assert starts is not None, "the whole arena serves whichever shape is wanted"
            assert not allocator.can_fit(shape)
            allocator.free(starts)


def test_an_arena_smaller_than_a_chunk_holds_nothing() -> None:
    allocator = PageAllocator(CHUNK_UNITS - 1)
    assert allocator.allocate([1]) is None
    assert allocator.allocate([]) == []
    allocator.check_integrity()


def test_returning_twice_is_our_bug() -> None:
    allocator = PageAllocator(CHUNK_UNITS)
    starts = allocator.allocate([8, 8])
    assert starts is not None
    allocator.free(starts[:1])
    with pytest.raises(AssertionError):
        allocator.free(starts[:1])


def test_extents_of_a_size_lie_one_behind_the_other_also_after_an_eviction() -> None:
    allocator, sizes = PageAllocator(256 * CHUNK_UNITS), [72, 24, 72, 72, 24] * 40
    adapters = [allocator.allocate(sizes) for _ in range(3)]
    allocator.free(adapters[1] or [])
    adapters.append(allocator.allocate(sizes))
    for starts in adapters:
        assert starts is not None
        for size in (24, 72):
            of_size = [start for start, other in zip(starts, sizes, strict=True) if other == size]
            follows = [after == before + size for before, after in itertools.pairwise(of_size)]
            assert sum(follows) >= 0.8 * len(follows)  # but from one slab to the next


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    gaps=st.lists(st.integers(0, 1), min_size=30, max_size=30),
)
def test_extents_that_lie_one_behind_the_other_are_one_run(sizes: list[int], gaps: list[int]) -> None:
    starts = [sum(sizes[:index]) + sum(gaps[: index + 1]) for index in range(len(sizes))]
    runs = joined_extents(starts, sizes)
    units = [
        (start + unit, sum(sizes[:index]) + unit) for index, start in enumerate(starts) for unit in range(sizes[index])
    ]
    assert [(run.start + unit, run.first + unit) for run in runs for unit in range(run.num_units)] == units
    assert len(runs) == 1 + sum(gaps[1 : len(sizes)])
