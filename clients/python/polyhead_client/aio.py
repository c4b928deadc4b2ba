"""The asyncio client. What it sends and how it reads an answer is in `wire`; `client` mirrors it method by method."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from polyhead_client import wire
from polyhead_client.errors import Cancelled, DeadlineExceeded, Unavailable, translated
from polyhead_client.types import (
    Adapter,
    AdapterIdentity,
    Chunk,
    Generation,
    Message,
    SamplingOptions,
    Score,
    ServerInfo,
)
from polyhead_proto.v1 import adapters_pb2, server_pb2


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Like `translated`; and gRPC's CancelledError of a call that was closed, where nobody cancelled the task."""
    try:
        with translated():
            yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled("the stream or its client was closed") from None


class AsyncStream:
    """An answer on its way: iterate for its chunks. Leaving it, or `close`, cancels what is left of it."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._builder = wire.GenerationBuilder()

    @property
    def request_id(self) -> str:
        """Empty until the first chunk."""
        return self._builder.request_id

    @property
    def adapter(self) -> AdapterIdentity | None:
        """The weights that answer, from the first chunk on; None: the backbone alone."""
        return self._builder.adapter

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        with _translated():
            async for event in self._call:
                chunk = self._builder.add(event)
                if chunk is not None:
                    yield chunk

    async def result(self) -> Generation:
        """Reads what is left and returns the whole answer."""
        async for _ in self:
            pass
        return self._builder.result()

    async def close(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClient:
    """Talks to one server, on the event loop that it was made on. Raises the errors of `polyhead_client.errors`."""

    def __init__(self, target: str = wire.DEFAULT_TARGET) -> None:
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, options=wire.channel_options(target))
        self._stubs = wire.Stubs(self._channel)

    async def close(self) -> None:
        """Cancels calls under way."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(
        self,
        prompt: wire.Prompt,
        *,
        adapter: str | None = None,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Continues a text, or token ids as they are. `adapter` None: the backbone alone."""
        stream = self.stream(
            prompt, adapter=adapter, parse_special_tokens=parse_special_tokens, timeout_s=timeout_s, **sampling
        )
        async with stream:
            return await stream.result()

    def stream(
        self,
        prompt: wire.Prompt,
        *,
        adapter: str | None = None,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """Like generate, chunk by chunk. Close the stream, or use it as a context manager."""
        request = wire.generate_request(prompt, adapter, parse_special_tokens, sampling)
        with translated():
            return AsyncStream(self._stubs.inference.Generate(request, timeout=timeout_s))

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """The assistant's next message in a conversation of {"role": ..., "content": ...}."""
        async with self.chat_stream(messages, adapter=adapter, timeout_s=timeout_s, **sampling) as stream:
            return await stream.result()

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncStream:
        request = wire.chat_request(messages, adapter, sampling)
        with translated():
            return AsyncStream(self._stubs.inference.Chat(request, timeout=timeout_s))

    async def score(
        self,
        text: wire.Prompt,
        *,
        adapter: str | None = None,
        top_logprobs: int = 0,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> Score:
        """Log-probabilities of a given text or of given token ids."""
        request = wire.score_request(text, adapter, top_logprobs, parse_special_tokens)
        with _translated():
            return wire.to_score(await self._stubs.inference.Score(request, timeout=timeout_s))

    async def adapters(self, *, timeout_s: float | None = None) -> tuple[Adapter, ...]:
        with _translated():
            response = await self._stubs.adapters.List(adapters_pb2.ListAdaptersRequest(), timeout=timeout_s)
        return tuple(wire.to_adapter(adapter) for adapter in response.adapters)

    async def adapter(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(name=wire.adapter_name(name))
        with _translated():
            return wire.to_adapter(await self._stubs.adapters.Get(request, timeout=timeout_s))

    async def load(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        """Returns once the adapter is in the device pool."""
        request = adapters_pb2.LoadAdapterRequest(name=wire.adapter_name(name))
        with _translated():
            return wire.to_adapter(await self._stubs.adapters.Load(request, timeout=timeout_s))

    async def unload(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        """Gives up the adapter's memory; it is loaded again on demand."""
        request = adapters_pb2.UnloadAdapterRequest(name=wire.adapter_name(name))
        with _translated():
            return wire.to_adapter(await self._stubs.adapters.Unload(request, timeout=timeout_s))

    async def pin(self, name: str, pinned: bool = True, *, timeout_s: float | None = None) -> Adapter:
        """Keeps the adapter in the device pool, or lets it be evicted again."""
        request = adapters_pb2.PinAdapterRequest(name=wire.adapter_name(name), pinned=pinned)
        with _translated():
            return wire.to_adapter(await self._stubs.adapters.Pin(request, timeout=timeout_s))

    async def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        with _translated():
            return wire.to_server_info(await self._stubs.server.Info(server_pb2.InfoRequest(), timeout=timeout_s))

    async def wait_until_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Returns once the server answers and takes requests; raises DeadlineExceeded when it does not."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            with contextlib.suppress(Unavailable, DeadlineExceeded):  # not there yet: ask again
                info = await self.info(timeout_s=max(0.01, until_s - time.monotonic()))
                if not info.draining:
                    return info
            await asyncio.sleep(wire.READY_POLL_S)
        raise wire.never_ready(self.target, timeout_s)
