"""A service on an event loop and a thread of its own, for tests, benchmarks and programs that embed a server."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from polyhead_server.config import ServerConfig
from polyhead_server.metrics import Metrics
from polyhead_server.service.ports import AdapterStore, Backbone, Engine
from polyhead_server.service.server import Service


class BackgroundService:
    """`with BackgroundService(...) as service:` listens at `service.address` until the block ends."""

    def __init__(
        self, config: ServerConfig, engine: Engine, store: AdapterStore, backbone: Backbone, metrics: Metrics
    ) -> None:
        self._parts = (config, engine, store, backbone, metrics)
        self._host = config.listen.rpartition(":")[0]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="polyhead-service", daemon=True)
        self._service: Service | None = None
        self.address = ""

    def start(self) -> str:
        """Returns HOST:PORT."""
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.address = f"{self._host}:{port}"
        return self.address

    async def _start(self) -> int:
        self._service = Service(*self._parts)
        return await self._service.start()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Blocks until the server has drained and stopped; see Service.drain."""
        assert self._service is not None
        return asyncio.run_coroutine_threadsafe(self._service.drain(timeout_s), self._loop).result()

    def stop(self) -> None:
        if self._service is not None:
            asyncio.run_coroutine_threadsafe(self._service.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
