"""What the service needs of the engine, the adapter store and the backbone, and nothing more. Test doubles fit."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Protocol

from polyhead_server.request import AdapterVersion, EventSink, Request


class EngineStatus(Protocol):
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def draining(self) -> bool: ...
    @property
    def healthy(self) -> bool: ...


class Engine(Protocol):
    @property
    def max_model_len(self) -> int: ...
    @property
    def kv_cache_bytes(self) -> int: ...
    def submit(self, request: Request, sink: EventSink) -> None:
        """Admits a request or raises QueueFull, Draining or InvalidRequest. Thread-safe, does not block."""

    def cancel(self, request_id: str) -> None:
        """Ends a request early; harmless when it has ended. Thread-safe, does not block."""

    def start(self) -> None: ...
    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones; False: some had to be failed. Blocks."""

    def stop(self) -> None: ...
    def status(self) -> EngineStatus: ...


class AdapterInfo(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def peft_type(self) -> str: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def residency(self) -> enum.Enum:
        """A member called DISK, HOST, LOADING or DEVICE."""

    @property
    def pinned(self) -> bool: ...
    @property
    def active_requests(self) -> int: ...
    @property
    def error(self) -> str: ...


class AdapterStore(Protocol):
    @property
    def pool_bytes(self) -> int: ...
    @property
    def pool_used_bytes(self) -> int: ...
    def knows(self, name: str) -> bool:
        """Whether there is such an adapter, usable or not; in memory."""

    def resolve(self, name: str) -> AdapterVersion:
        """The version a name means now; in memory. Raises UnknownAdapter or AdapterRejected."""

    def refresh(self) -> None:
        """Looks at the adapters folder again. Blocks."""

    def list(self) -> Sequence[AdapterInfo]: ...
    def get(self, name: str) -> AdapterInfo: ...
    def try_load(self, name: str) -> AdapterInfo | None:
        """The adapter once it is on the device; None: not yet, ask again. Does not block."""

    def try_unload(self, name: str) -> AdapterInfo | None:
        """The adapter without its memory; None: not yet, ask again. Does not block."""

    def pin(self, name: str, pinned: bool) -> AdapterInfo: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class Backbone(Protocol):
    @property
    def tokenizer(self) -> Any:
        """A fast tokenizer of transformers."""

    @property
    def source(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
