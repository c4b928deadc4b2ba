"""List, Get, Load, Unload and Pin: the adapter store's own operations, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import grpc

from polyhead_proto.v1 import adapters_pb2, adapters_pb2_grpc
from polyhead_server.service import convert
from polyhead_server.service.adapter_lookup import AdapterLookup
from polyhead_server.service.ports import AdapterInfo, AdapterStore

Context = grpc.aio.ServicerContext[Any, Any]


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
        return await self._on(message.name, lambda: self._store.load(message.name))

    async def Unload(self, message: adapters_pb2.UnloadAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        return await self._on(message.name, lambda: self._store.unload(message.name))

    async def Pin(self, message: adapters_pb2.PinAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        return await self._on(message.name, lambda: self._store.pin(message.name, message.pinned))

    async def _on(self, name: str, operation: Callable[[], AdapterInfo]) -> adapters_pb2.Adapter:
        await self._lookup.ensure_known(name)
        info = await asyncio.get_running_loop().run_in_executor(self._executor, operation)
        return convert.from_adapter_info(info)
