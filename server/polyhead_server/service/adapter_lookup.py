"""From the name a caller gives to an adapter version: checks it, asks the store, has the folder looked at again."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from polyhead_core.errors import InvalidRequest, UnknownAdapter

from polyhead_server.request import AdapterVersion
from polyhead_server.service.ports import AdapterStore

MAX_NAME_CHARS = 255
_EXPECTED = f"a folder's name: 1 to {MAX_NAME_CHARS} characters without path separators, '..' or control characters"


def check_name(name: str) -> None:
    """Raises InvalidRequest unless `name` could be a sub-folder's name. Touches no disk."""
    usable = (
        0 < len(name) <= MAX_NAME_CHARS
        and ".." not in name
        and not any(char in "/\\" or not (char.isprintable() or char == " ") for char in name)
    )
    if not usable:
        raise InvalidRequest(
            f"adapter name {name[:64]!r} is not usable: expected {_EXPECTED}",
            details={"field": "adapter", "given": name},
        )


class AdapterLookup:
    """Resolves names. An unknown one costs a scan of the folder, shared by all who wait and rate limited."""

    def __init__(self, store: AdapterStore, executor: Executor, *, min_scan_interval_s: float = 0.5) -> None:
        self._store = store
        self._executor = executor
        self._min_scan_interval_s = min_scan_interval_s
        self._scanning = asyncio.Lock()
        self._scan_began_s = -min_scan_interval_s

    async def resolve(self, name: str) -> AdapterVersion | None:
        """The version that `name` means now; None for the backbone alone. Raises UnknownAdapter or AdapterRejected."""
        if not name:
            return None
        check_name(name)
        try:
            return self._store.resolve(name)
        except UnknownAdapter:
            await self._scan()
        return self._store.resolve(name)

    async def ensure_known(self, name: str) -> None:
        """Returns if there is such an adapter, usable or not; else raises UnknownAdapter."""
        check_name(name)
        try:
            self._store.get(name)
        except UnknownAdapter:
            await self._scan()
            self._store.get(name)

    async def _scan(self) -> None:
        """Returns after a scan of the folder that began after this call."""
        asked_s = time.monotonic()
        async with self._scanning:
            if self._scan_began_s >= asked_s:
                return
            await asyncio.sleep(max(0.0, self._scan_began_s + self._min_scan_interval_s - time.monotonic()))
            self._scan_began_s = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(self._executor, self._store.refresh)
