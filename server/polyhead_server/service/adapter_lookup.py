"""From the name a caller gives to an adapter version: checks it, asks the store, has the folder looked at again."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from polyhead_core.adapter_directory import check_adapter_name
from polyhead_server.request import AdapterVersion
from polyhead_server.service.ports import AdapterStore


class AdapterLookup:
    """Resolves names. An unknown one costs a scan of the folder, shared by all who wait and rate limited."""

    def __init__(self, store: AdapterStore, executor: Executor, *, min_scan_interval_s: float = 0.5) -> None:
        self._store = store
        self._executor = executor
        self._min_scan_interval_s = min_scan_interval_s
        self._scanning = asyncio.Lock()
        self._scan_began_s = -min_scan_interval_s
        self._next_scan: asyncio.Task[None] | None = None
        """Has not begun yet."""

    def knows(self, name: str) -> bool:
        return self._store.knows(name)

    async def resolve(self, name: str) -> AdapterVersion | None:
        """The version that `name` means now; None for the backbone alone. Raises UnknownAdapter or AdapterRejected."""
        if not name:
            return None
        check_adapter_name(name)
        if not self._store.knows(name):
            await self._scan()
        return self._store.resolve(name)

    async def ensure_known(self, name: str) -> None:
        """Returns if there is such an adapter, usable or not; else raises UnknownAdapter."""
        check_adapter_name(name)
        if not self._store.knows(name):
            await self._scan()
        self._store.get(name)

    async def _scan(self) -> None:
        """Returns after a scan of the folder that began after this call.

        The scan is nobody's own: a caller who goes away leaves it to the others who wait for it.
        """
        if self._next_scan is None:
            self._next_scan = asyncio.create_task(self._scan_once())
        await asyncio.shield(self._next_scan)

    async def _scan_once(self) -> None:
        async with self._scanning:
            await asyncio.sleep(max(0.0, self._scan_began_s + self._min_scan_interval_s - time.monotonic()))
            self._next_scan = None  # whoever asks from here on has come too late for this one
            self._scan_began_s = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(self._executor, self._store.refresh)
