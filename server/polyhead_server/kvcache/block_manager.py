"""Who holds which KV block, and which blocks hold the KV of a known prefix. Knows no tensor and no request.

A full, computed block is known by the SHA-256 of its tokens and of all before them; the chain starts at (tenant,
adapter hash), so that nothing is shared between tenants, adapters or versions. Partly filled blocks are never shared.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks of one sequence, in order. Made by `BlockManager.new_table`, changed by the manager alone."""

    root: bytes
    """Start of the hash chain: stands for tenant and adapter version."""
    block_ids: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Chained digests of the leading blocks that are known to be full and computed; at most as many as blocks."""


class BlockManager:
    """Hands out `num_blocks` reference-counted blocks of `block_size` tokens.

    A block whose contents are known stays findable without references until it is taken again, oldest release first.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        assert min(num_blocks, block_size) >= 1, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))  # no references, contents unknown
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # no references, contents known; oldest first

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._cached_free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their prefix, referenced or not."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def new_table(self, tenant: str, adapter_hash: str | None) -> BlockTable:
        # Each part is hashed by itself first, so that no choice of names can imitate another pair.
        adapter = b"" if adapter_hash is None else sha256(adapter_hash.encode()).digest()
        return BlockTable(sha256(sha256(tenant.encode()).digest() + adapter).digest())

    def match_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """Takes the cached blocks of the longest known prefix into an empty `table`; returns their number of tokens.

        At least the last token is always left to compute: its logits are wanted.
        """
        assert not table.block_ids, "prefixes are matched before anything is allocated"
        if not self.prefix_caching:
            return 0
        key = table.root
        for index in range((len(token_ids) - 1) // self.block_size):
            key = self._next_key(key, token_ids, index)
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            if self._refs[block_id] == 0:
                del self._cached_free[block_id]
            self._refs[block_id] += 1
            table.block_ids.append(block_id)
            table.keys.append(key)
        return len(table.block_ids) * self.block_size

    def allocate(self, table: BlockTable, num_tokens: int) -> bool:
        """Makes `table` cover its first `num_tokens` tokens; if too few blocks are free, False and no change."""
        num_missing = self.blocks_for(num_tokens) - len(table.block_ids)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            block_id = self._take()
            self._refs[block_id] = 1
            table.block_ids.append(block_id)
        return True

    def register(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Makes the blocks that are full of computed tokens findable by their prefix."""
        if not self.prefix_caching:
            return
        for index in range(len(table.keys), num_computed_tokens // self.block_size):
            key = self._next_key(table.keys[-1] if table.keys else table.root, token_ids, index)
            table.keys.append(key)
            # Where two sequences computed the same prefix at once the first one's block is kept; ours stays private.
            if key not in self._block_of:
                self._block_of[key] = table.block_ids[index]
                self._key_of[table.block_ids[index]] = key

    def release(self, table: BlockTable) -> None:
        """Gives all of a table's blocks back; their known contents stay findable until the blocks are taken again."""
        # Last block first: a prefix is of use without its continuation, a continuation is none without its prefix.
        for block_id in reversed(table.block_ids):
            self._refs[block_id] -= 1
            assert self._refs[block_id] >= 0, f"block {block_id} released too often"
            if self._refs[block_id] == 0:
                if self._key_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached_free[block_id] = None
        table.block_ids.clear()
        table.keys.clear()

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """`tables` are all tables that hold blocks. Raises AssertionError where the bookkeeping contradicts itself."""
        held: Counter[int] = Counter()
        for table in tables:
            assert len(set(table.block_ids)) == len(table.block_ids), "a block twice in one table"
            assert len(table.keys) <= len(table.block_ids), "a key without a block"
            held.update(table.block_ids)
        assert all(self._refs[block_id] == held[block_id] for block_id in range(self.num_blocks)), "wrong references"
        free = [*self._free, *self._cached_free]
        assert len(set(free)) == len(free), "a block is free twice"
        unreferenced = {block_id for block_id in range(self.num_blocks) if self._refs[block_id] == 0}
        assert unreferenced == set(free), "free lists and references differ"
        assert all(self._key_of[block_id] is None for block_id in self._free), "a known block on the plain free list"
        keys = {key: block_id for block_id, key in enumerate(self._key_of) if key is not None}
        assert keys == self._block_of, "keys and blocks do not mirror each other"
        assert all(self._key_of[block_id] is not None for block_id in self._cached_free)

    def _take(self) -> int:
        if self._free:
            return self._free.popleft()
        block_id, _ = self._cached_free.popitem(last=False)
        key = self._key_of[block_id]
        assert key is not None
        del self._block_of[key]
        self._key_of[block_id] = None
        return block_id

    def _next_key(self, parent: bytes, token_ids: Sequence[int], index: int) -> bytes:
        tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
        assert len(tokens) == self.block_size
        return sha256(parent + array("q", tokens).tobytes()).digest()
