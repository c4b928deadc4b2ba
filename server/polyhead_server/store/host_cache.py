"""Packed adapters in host memory, behind the device pool: the least recently used go when the bytes run out."""

from __future__ import annotations

from collections import OrderedDict

from polyhead_server.store.packing import PackedAdapter


class HostCache:
    """Not thread-safe: its owner has the lock."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._adapters

    def get(self, content_hash: str) -> PackedAdapter | None:
        adapter = self._adapters.get(content_hash)
        if adapter is not None:
            self._adapters.move_to_end(content_hash)
        return adapter

    def put(self, adapter: PackedAdapter) -> None:
        """Keeps it if it fits at all."""
        self.drop(adapter.content_hash)
        if adapter.num_bytes > self.max_bytes:
            return
        while self.num_bytes + adapter.num_bytes > self.max_bytes:
            self.drop(next(iter(self._adapters)))
        self._adapters[adapter.content_hash] = adapter
        self.num_bytes += adapter.num_bytes

    def drop(self, content_hash: str) -> None:
        adapter = self._adapters.pop(content_hash, None)
        if adapter is not None:
            self.num_bytes -= adapter.num_bytes

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(adapter.num_bytes for adapter in self._adapters.values()) <= self.max_bytes
        assert all(key == adapter.content_hash for key, adapter in self._adapters.items())
