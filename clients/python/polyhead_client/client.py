"""The blocking client. What it sends and how it reads an answer is in `wire`; `aio` mirrors it method by method."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from polyhead_client import wire
from polyhead_client.errors import DeadlineExceeded, Unavailable, translated
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


class Stream:
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

    def __iter__(self) -> Iterator[Chunk]:
        with translated():
            for event in self._call:
                chunk = self._builder.add(event)
                if chunk is not None:
                    yield chunk

    def result(self) -> Generation:
        """Reads what is left and returns the whole answer."""
        for _ in self:
            pass
        return self._builder.result()

    def close(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """Talks to one server. Thread-safe. Raises the errors of `polyhead_client.errors`."""

    def __init__(self, target: str = wire.DEFAULT_TARGET) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=wire.channel_options(target))
        self._stubs = wire.Stubs(self._channel)

    def close(self) -> None:
        """Cancels calls under way."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def generate(
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
        with stream:
            return stream.result()

    def stream(
        self,
        prompt: wire.Prompt,
        *,
        adapter: str | None = None,
        parse_special_tokens: bool = False,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Like generate, chunk by chunk. Close the stream, or use it as a context manager."""
        request = wire.generate_request(prompt, adapter, parse_special_tokens, sampling)
        with translated():
            return Stream(self._stubs.inference.Generate(request, timeout=timeout_s))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """The assistant's next message in a conversation of {"role": ..., "content": ...}."""
        with self.chat_stream(messages, adapter=adapter, timeout_s=timeout_s, **sampling) as stream:
            return stream.result()

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        adapter: str | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        request = wire.chat_request(messages, adapter, sampling)
        with translated():
            return Stream(self._stubs.inference.Chat(request, timeout=timeout_s))

    def score(
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
        with translated():
            return wire.to_score(self._stubs.inference.Score(request, timeout=timeout_s))

    def adapters(self, *, timeout_s: float | None = None) -> tuple[Adapter, ...]:
        with translated():
            response = self._stubs.adapters.List(adapters_pb2.ListAdaptersRequest(), timeout=timeout_s)
        return tuple(wire.to_adapter(adapter) for adapter in response.adapters)

    def adapter(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(name=wire.adapter_name(name))
        with translated():
            return wire.to_adapter(self._stubs.adapters.Get(request, timeout=timeout_s))

    def load(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        """Returns once the adapter is in the device pool."""
        request = adapters_pb2.LoadAdapterRequest(name=wire.adapter_name(name))
        with translated():
            return wire.to_adapter(self._stubs.adapters.Load(request, timeout=timeout_s))

    def unload(self, name: str, *, timeout_s: float | None = None) -> Adapter:
        """Gives up the adapter's memory; it is loaded again on demand."""
        request = adapters_pb2.UnloadAdapterRequest(name=wire.adapter_name(name))
        with translated():
            return wire.to_adapter(self._stubs.adapters.Unload(request, timeout=timeout_s))

    def pin(self, name: str, pinned: bool = True, *, timeout_s: float | None = None) -> Adapter:
        """Keeps the adapter in the device pool, or lets it be evicted again."""
        request = adapters_pb2.PinAdapterRequest(name=wire.adapter_name(name), pinned=pinned)
        with translated():
            return wire.to_adapter(self._stubs.adapters.Pin(request, timeout=timeout_s))

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        with translated():
            return wire.to_server_info(self._stubs.server.Info(server_pb2.InfoRequest(), timeout=timeout_s))

    def wait_until_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Returns once the server answers and takes requests; raises DeadlineExceeded when it does not."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            with contextlib.suppress(Unavailable, DeadlineExceeded):  # not there yet: ask again
                info = self.info(timeout_s=max(0.01, until_s - time.monotonic()))
                if not info.draining:
                    return info
            time.sleep(wire.READY_POLL_S)
        raise wire.never_ready(self.target, timeout_s)
