"""The gRPC server as a whole: services, health, reflection, and its life from start to drain. Owns the executors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from polyhead_core.errors import ConfigError
from polyhead_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from polyhead_server.config import ServerConfig
from polyhead_server.metrics import Metrics
from polyhead_server.service.adapter_lookup import AdapterLookup
from polyhead_server.service.adapters import AdaptersService
from polyhead_server.service.edge import EdgeInterceptor
from polyhead_server.service.inference import InferenceService
from polyhead_server.service.info import InfoService
from polyhead_server.service.ports import AdapterStore, Backbone, Engine
from polyhead_server.service.prompts import PromptEncoder, TokenTexts

_log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SENT_BYTES = 64 << 20
MIN_RECEIVED_BYTES = 16 << 20
"""Well above any prompt that fits, so that a prompt that does not gets our error and not gRPC's; and twice the longest
that a large context takes."""
MAX_PENDING_CALLS = 20_000
"""Calls that have come in a burst and that the event loop has not seen yet. Of more than this, and by default of more
than 1000, gRPC cancels some at random, without a word; of those that it has seen too many get RESOURCE_EXHAUSTED."""
SPARE_CALLS = 256
"""Calls at once beside those of queue and batch: what asks for health and adapters, and answers that are still read."""

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_SENT_BYTES),
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    # Two servers on one port would share its calls by chance.
    ("grpc.so_reuseport", 0),
    # A client whose network is gone is found out, and its requests are cancelled.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

_SERVICE_NAMES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((inference_pb2, "Inference"), (adapters_pb2, "Adapters"), (server_pb2, "Server"))
)

_FLUSH_S = 5.0
"""After the last request has ended, how long slow readers may take for what was said to them."""

_HEALTH_INTERVAL_S = 0.5


class Service:
    """One server over one engine. Create, start and stop it on one event loop; it starts and stops engine and store."""

    def __init__(
        self, config: ServerConfig, engine: Engine, store: AdapterStore, backbone: Backbone, metrics: Metrics
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._text_executor = ThreadPoolExecutor(2, thread_name_prefix="polyhead-text")
        self._store_executor = ThreadPoolExecutor(2, thread_name_prefix="polyhead-store")
        lookup = AdapterLookup(store, self._store_executor)
        encoder = PromptEncoder(backbone.tokenizer, vocab_size=backbone.vocab_size, max_model_len=engine.max_model_len)
        texts = TokenTexts(backbone.tokenizer)
        self._max_received_bytes = max(MIN_RECEIVED_BYTES, min(2 * encoder.max_prompt_bytes, 2**31 - 1))
        self._inference = InferenceService(config, engine, lookup, encoder, texts, metrics, self._text_executor)
        self._adapters = AdaptersService(store, lookup, self._store_executor)
        self._info = InfoService(config, engine, store, backbone)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._health_watch: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Starts store and engine, then listens. Returns the port. Raises ConfigError where it cannot listen."""
        server = grpc.aio.server(
            interceptors=[EdgeInterceptor()],
            options=(*_OPTIONS, ("grpc.max_receive_message_length", self._max_received_bytes)),
            maximum_concurrent_rpcs=self._config.max_queued_requests + self._config.max_batch_rows + SPARE_CALLS,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)  # type: ignore[no-untyped-call]
        adapters_pb2_grpc.add_AdaptersServicer_to_server(self._adapters, server)  # type: ignore[no-untyped-call]
        server_pb2_grpc.add_ServerServicer_to_server(self._info, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._config.listen}: is the port taken?") from error
        self._store.start()
        self._engine.start()
        await self._set_health(True)
        await server.start()
        self._server = server
        self._health_watch = asyncio.create_task(self._watch_health())
        return port

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests, lets the running ones finish, then stops. False: some had to be failed."""
        await self._end_health_watch()
        await self._health.enter_graceful_shutdown()
        limit_s = self._config.drain_timeout_s if timeout_s is None else timeout_s
        _log.info("draining: running requests have %g s to finish", limit_s)
        all_finished = await _in_daemon_thread(lambda: self._engine.drain(limit_s))
        await self.stop(grace_s=_FLUSH_S)
        return all_finished

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stops at once, or gives calls under way `grace_s` to take their last events. Idempotent."""
        await self._end_health_watch()
        server, self._server = self._server, None
        if server is None:
            return
        await server.stop(grace_s)
        await _in_daemon_thread(self._engine.stop)
        await _in_daemon_thread(self._store.stop)
        for executor in (self._text_executor, self._store_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    async def _watch_health(self) -> None:
        """Says NOT_SERVING once the engine's thread is lost: nothing here can bring it back."""
        while self._engine.status().healthy:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
        _log.critical("the engine has failed; health is NOT_SERVING")
        await self._set_health(False)

    async def _end_health_watch(self) -> None:
        if self._health_watch is not None:
            self._health_watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._health_watch
            self._health_watch = None

    async def _set_health(self, is_serving: bool) -> None:
        values = health_pb2.HealthCheckResponse
        for name in ("", *_SERVICE_NAMES):
            await self._health.set(name, values.SERVING if is_serving else values.NOT_SERVING)


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Like run_in_executor, in a thread that does not keep the process alive when it is told to stop at once."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def run() -> None:
        try:
            result = function()
        except Exception as error:
            failure = error
            outcome: Callable[[], None] = lambda: future.set_exception(failure)  # noqa: E731
        else:
            outcome = lambda: future.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, daemon=True, name="polyhead-stop").start()
    return await future
