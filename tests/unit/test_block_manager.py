"""Reference counts, sharing by prefix and eviction of KV blocks."""

from __future__ import annotations

import random

import pytest

from polyhead_server.kvcache.block_manager import BlockManager, BlockTable


def computed(blocks: BlockManager, tokens: list[int], tenant: str = "t", adapter: str | None = None) -> BlockTable:
    """A table whose tokens are all computed."""
    table = blocks.new_table(tenant, adapter)
    blocks.match_prefix(table, tokens)
    assert blocks.allocate(table, len(tokens))
    blocks.register(table, tokens, len(tokens))
    return table


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(4, 8)
    table, other = blocks.new_table("t", None), blocks.new_table("t", None)
    assert blocks.allocate(table, 17)
    assert len(table.block_ids) == 3
    assert blocks.allocate(table, 24), "the last block has room"
    assert len(table.block_ids) == 3
    assert not blocks.allocate(other, 9)
    assert other.block_ids == []
    assert (blocks.num_free, blocks.num_used) == (1, 3)
    blocks.check_integrity([table, other])
    blocks.release(table)
    assert (blocks.num_free, blocks.num_used) == (4, 0)
    blocks.check_integrity([])


def test_full_blocks_are_shared_and_the_partial_one_is_not() -> None:
    blocks = BlockManager(16, 4)
    first = computed(blocks, list(range(10)))
    second = blocks.new_table("t", None)
    assert blocks.match_prefix(second, list(range(10))) == 8
    assert second.block_ids == first.block_ids[:2]
    assert blocks.allocate(second, 10)
    assert second.block_ids[2] != first.block_ids[2]
    assert blocks.num_used == 4
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.check_integrity([second])
    assert blocks.num_used == 3


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_left_to_compute(length: int, cached: int) -> None:
    blocks = BlockManager(16, 4)
    computed(blocks, list(range(12)))
    assert blocks.match_prefix(blocks.new_table("t", None), list(range(length))) == cached


def test_only_computed_tokens_are_registered() -> None:
    blocks = BlockManager(16, 4)
    table = blocks.new_table("t", None)
    tokens = list(range(12))
    assert blocks.allocate(table, 12)
    blocks.register(table, tokens, 7)
    assert blocks.match_prefix(blocks.new_table("t", None), tokens) == 4
    blocks.register(table, tokens, 8)
    assert blocks.match_prefix(blocks.new_table("t", None), tokens) == 8


def test_nothing_is_shared_between_tenants_or_adapters() -> None:
    blocks = BlockManager(64, 4)
    tokens = list(range(9))
    roots = [("a", None), ("b", None), ("a", "h1"), ("a", "h2"), ("b", "h1"), ("ah1", None), ("", "ah1")]
    tables = []
    for tenant, adapter in roots:
        table = blocks.new_table(tenant, adapter)
        assert blocks.match_prefix(table, tokens) == 0, (tenant, adapter)
        tables.append(computed(blocks, tokens, tenant, adapter))
    assert len({block_id for table in tables for block_id in table.block_ids}) == 3 * len(roots)
    blocks.check_integrity(tables)


def test_equal_tokens_after_another_prefix_do_not_match() -> None:
    blocks = BlockManager(16, 4)
    computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.match_prefix(blocks.new_table("t", None), [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert blocks.match_prefix(blocks.new_table("t", None), [5, 6, 7, 8, 9]) == 0


def test_released_blocks_stay_findable_and_the_oldest_go_first() -> None:
    blocks = BlockManager(4, 2)
    old, new = computed(blocks, [1, 2, 3, 4]), computed(blocks, [5, 6, 7, 8])
    blocks.release(old)
    blocks.release(new)
    assert (blocks.num_free, blocks.num_cached) == (4, 4)
    taker = blocks.new_table("t", None)
    assert blocks.allocate(taker, 2)
    # The end of the older prefix went; its beginning and the newer prefix are still there.
    again_old, again_new = blocks.new_table("t", None), blocks.new_table("t", None)
    assert blocks.match_prefix(again_old, [1, 2, 3, 4, 9]) == 2
    assert blocks.match_prefix(again_new, [5, 6, 7, 8, 9]) == 4
    assert blocks.num_free == 0
    assert not blocks.allocate(taker, 4)
    blocks.check_integrity([taker, again_old, again_new])


def test_the_same_prefix_computed_twice_at_once() -> None:
    blocks = BlockManager(8, 2)
    tokens = [1, 2, 3, 4]
    tables = [blocks.new_table("t", None) for _ in range(2)]
    for table in tables:
        assert blocks.allocate(table, 4)
    for table in tables:
        blocks.register(table, tokens, 4)
        blocks.check_integrity(tables)
    blocks.release(tables[0])
    blocks.check_integrity(tables[1:])
    blocks.release(tables[1])
    blocks.check_integrity([])
    assert (blocks.num_free, blocks.num_cached) == (8, 2)


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(8, 2, prefix_caching=False)
    blocks.release(computed(blocks, [1, 2, 3, 4]))
    assert blocks.match_prefix(blocks.new_table("t", None), [1, 2, 3, 4, 5]) == 0
    assert blocks.num_cached == 0


def test_releasing_twice_is_harmless_and_integrity_notices_a_lost_table() -> None:
    blocks = BlockManager(8, 2)
    table = computed(blocks, [1, 2, 3])
    with pytest.raises(AssertionError, match="wrong references"):
        blocks.check_integrity([])
    blocks.release(table)
    blocks.release(table)
    blocks.check_integrity([])


@pytest.mark.parametrize("seed", range(6))
def test_random_use_never_serves_foreign_contents(seed: int) -> None:
    """Every matched block must hold the KV of just this prefix of just this tenant and adapter."""
    rng = random.Random(seed)
    blocks = BlockManager(rng.randint(4, 24), rng.choice([1, 2, 4]))
    contents: dict[int, tuple[object, ...]] = {}
    alive: list[tuple[BlockTable, list[int], tuple[str, str | None]]] = []
    for _ in range(1500):
        if alive and rng.random() < 0.45:
            blocks.release(alive.pop(rng.randrange(len(alive)))[0])
        else:
            who = (rng.choice("ab"), rng.choice([None, "x", "y"]))
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
            table = blocks.new_table(*who)
            num_cached = blocks.match_prefix(table, tokens)
            assert num_cached < len(tokens)
            size = blocks.block_size
            for index, block_id in enumerate(table.block_ids):
                assert contents[block_id] == (who, tokens[: (index + 1) * size])
            if not blocks.allocate(table, len(tokens)):
                blocks.release(table)
                continue
            num_computed = rng.randint(num_cached, len(tokens))
            for index in range(num_cached // size, num_computed // size):
                contents[table.block_ids[index]] = (who, tokens[: (index + 1) * size])
            blocks.register(table, tokens, num_computed)
            alive.append((table, tokens, who))
        blocks.check_integrity(table for table, _, _ in alive)
        assert blocks.num_free + blocks.num_used == blocks.num_blocks
    for table, _, _ in alive:
        blocks.release(table)
    assert blocks.num_used == 0
