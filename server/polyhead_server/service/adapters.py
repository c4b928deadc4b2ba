"""List, Get, Load, Unload and Pin: the adapter store's own operations.

Load and Unload wait for disks and for room; they wait on the event loop and hold no thread, so that any number of them
delays nobody. A call that is cancelled or past its deadline waits no longer: gRPC cancels its handler.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import grpc

from polyhead_core.errors import AdapterInUse, QueueFull
from polyhead_proto.v1 import adapters_pb2, adapters_pb2_grpc
from polyhead_server.service import convert
from polyhead_server.service.adapter_lookup import AdapterLookup
from polyhead_server.service.ports import AdapterInfo, AdapterStore

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_WAIT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1


class AdaptersService(adapters_pb2_grpc.AdaptersServicer):
    def __init__(self, store: AdapterStore, lookup: AdapterLookup, executor: Executor) -> None:
        self._store = store
        self._lookup = lookup
        self._executor = executor

    async def List(
        self, message: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        infos = await asyncio.get_running_loop().run_in_executor(self._executor, self._store.list)
        return adapters_pb2.ListAdaptersResponse(adapters=[convert.from_adapter_info(info) for info in infos])

    async def Get(self, message: adapters_pb2.GetAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        return await self._on(message.name, lambda: self._store.get(message.name))

    async def Load(self, message: adapters_pb2.LoadAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        info = await self._wait_for(message.name, self._store.try_load)
        if info is None:
            raise QueueFull(
                f"adapter {message.name!r} was not in the adapter pool after {_MAX_WAIT_S:g} s: running requests hold"
                " all the room; try again, or raise adapter_pool_bytes or max_resident_adapters",
                details={"adapter": message.name},
                retry_after_s=1.0,
            )
        return convert.from_adapter_info(info)

    async def Unload(self, message: adapters_pb2.UnloadAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        info = await self._wait_for(message.name, self._store.try_unload)
        if info is None:
            raise AdapterInUse(
                f"adapter {message.name!r} was still being loaded after {_MAX_WAIT_S:g} s; unload it when it is there",
                details={"adapter": message.name},
                retry_after_s=1.0,
            )
        return convert.from_adapter_info(info)

    async def Pin(self, message: adapters_pb2.PinAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        return await self._on(message.name, lambda: self._store.pin(message.name, message.pinned))

    async def _on(self, name: str, operation: Callable[[], AdapterInfo]) -> adapters_pb2.Adapter:
        await self._lookup.ensure_known(name)
        info = await asyncio.get_running_loop().run_in_executor(self._executor, operation)
        return convert.from_adapter_info(info)

    async def _wait_for(self, name: str, attempt: Callable[[str], AdapterInfo | None]) -> AdapterInfo | None:
        """What the first attempt that succeeds gives; None if none does for `_MAX_WAIT_S`."""
        await self._lookup.ensure_known(name)
        until_s = time.monotonic() + _MAX_WAIT_S
        pause_s = _FIRST_PAUSE_S
        while (info := attempt(name)) is None and time.monotonic() < until_s:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return info
