"""Between the client's types and protobuf, both ways, for the sync and the asyncio client. Opens no connection."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from polyhead_client.errors import DeadlineExceeded, InvalidRequest, ServerError
from polyhead_client.types import (
    Adapter,
    AdapterIdentity,
    BackboneInfo,
    Choice,
    Chunk,
    Generation,
    Limits,
    Message,
    SamplingOptions,
    Score,
    ServerInfo,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from polyhead_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

DEFAULT_TARGET = "127.0.0.1:50051"

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # gRPC's own pauses grow to two minutes: a server would be back long before a client sees it.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # How long one attempt may take, in spite of its name; 20 s where it is not set.
    ("grpc.min_reconnect_backoff_ms", 5000),
)

_OWN_MACHINE = re.compile(r"((dns:///|ipv4:|ipv6:)?(localhost|127(\.\d+){3}|\[::1\])(:\d+)?)|unix:.*", re.IGNORECASE)

READY_POLL_S = 0.2
_LONGEST_TIMEOUT_S = 1e9

Prompt = str | Sequence[int]
D = TypeVar("D")

_FINISH_REASONS = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """gRPC goes by way of the environment's http_proxy, from which no way leads back to this machine's loopback."""
    return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if _OWN_MACHINE.fullmatch(target) else CHANNEL_OPTIONS


class Stubs:
    """The three services over one channel, sync or asyncio; gRPC generates them without types."""

    def __init__(self, channel: Any) -> None:
        self.inference = _AnyTimeout(inference_pb2_grpc.InferenceStub(channel))  # type: ignore[no-untyped-call]
        self.adapters = _AnyTimeout(adapters_pb2_grpc.AdaptersStub(channel))  # type: ignore[no-untyped-call]
        self.server = _AnyTimeout(server_pb2_grpc.ServerStub(channel))  # type: ignore[no-untyped-call]


class _AnyTimeout:
    """A service whose calls take timeouts of any length: beyond some, gRPC's clocks overflow and end them at once."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._service, method)
        return lambda request, timeout=None: call(request, timeout=_limited(timeout))


def _limited(timeout_s: float | None) -> float | None:
    """None: no limit."""
    if timeout_s is not None and math.isnan(timeout_s):
        raise InvalidRequest("timeout_s = nan is not usable: expected seconds, or None for no limit")
    return None if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S else timeout_s


# Requests. Whatever protobuf refuses is the caller's mistake and is named as such.


def generate_request(
    prompt: Prompt, adapter: str | None, parse_special_tokens: bool, options: SamplingOptions
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(sampling=_sampling(options))
    _set(request, "adapter", adapter or "")
    _set(request, "parse_special_tokens", parse_special_tokens)
    _refuse_bytes("prompt", prompt)
    if isinstance(prompt, str):
        _set(request, "prompt", prompt)
    else:
        _extend("prompt", request.prompt_token_ids.ids, prompt)
        request.prompt_token_ids.SetInParent()
    return request


def chat_request(
    messages: Sequence[Message], adapter: str | None, options: SamplingOptions
) -> inference_pb2.ChatRequest:
    request = inference_pb2.ChatRequest(sampling=_sampling(options))
    _set(request, "adapter", adapter or "")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InvalidRequest(f"messages: expected dicts with the keys role and content, not {message!r:.100}")
        added = request.messages.add()
        _set(added, "role", message["role"])
        _set(added, "content", message["content"])
    return request


def score_request(
    text: Prompt, adapter: str | None, top_logprobs: int, parse_special_tokens: bool
) -> inference_pb2.ScoreRequest:
    request = inference_pb2.ScoreRequest()
    _set(request, "adapter", adapter or "")
    _set(request, "top_logprobs", top_logprobs)
    _set(request, "parse_special_tokens", parse_special_tokens)
    _refuse_bytes("text", text)
    if isinstance(text, str):
        _set(request, "text", text)
    else:
        _extend("text", request.token_ids.ids, text)
        request.token_ids.SetInParent()
    return request


def adapter_name(name: str) -> str:
    """`name`, if it can travel at all."""
    _set(adapters_pb2.GetAdapterRequest(), "name", name)
    return name


def _sampling(options: SamplingOptions) -> inference_pb2.SamplingParams:
    params = inference_pb2.SamplingParams()
    for name, value in options.items():
        if name not in SamplingOptions.__annotations__:
            raise TypeError(f"unknown argument {name!r}: expected one of {', '.join(SamplingOptions.__annotations__)}")
        if value is None:
            continue
        if name == "stop":
            _extend(name, params.stop, [value] if isinstance(value, str) else value)
        elif name == "stop_token_ids":
            _extend(name, params.stop_token_ids, value)
        else:
            _set(params, name, value)
    return params


def _refuse_bytes(field: str, value: object) -> None:
    # They are sequences of integers, and would be taken for token ids.
    if isinstance(value, bytes | bytearray | memoryview):
        raise InvalidRequest(f"{field} is {type(value).__name__}: expected a str (decode it) or token ids")


def _set(message: Any, field: str, value: object) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} = {value!r:.100} is not usable: {error}") from error


def _extend(field: str, target: Any, values: object) -> None:
    try:
        target.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} = {values!r:.100} is not usable: {error}") from error


# Replies.


def never_ready(target: str, timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no server at {target} was ready within {timeout_s:g} s")


class GenerationBuilder:
    """Gathers the events of one call. After its terminal event `result` gives the whole."""

    def __init__(self) -> None:
        self._started: inference_pb2.Started | None = None
        self._finished: inference_pb2.Finished | None = None
        self._chunks: dict[int, list[Chunk]] = {}

    @property
    def request_id(self) -> str:
        """Empty until the first event."""
        return self._started.request_id if self._started is not None else ""

    @property
    def adapter(self) -> AdapterIdentity | None:
        """None for the backbone alone, and until the first event."""
        return _identity(self._started.adapter) if self._started is not None else None

    def add(self, event: inference_pb2.GenerateEvent) -> Chunk | None:
        """The chunk that the event holds, if it holds one."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
        elif kind == "finished":
            self._finished = event.finished
        elif kind == "tokens":
            chunk = Chunk(
                index=event.tokens.index,
                text=event.tokens.text,
                token_ids=tuple(event.tokens.token_ids),
                logprobs=_logprobs(event.tokens.logprobs),
            )
            self._chunks.setdefault(chunk.index, []).append(chunk)
            return chunk
        return None

    def result(self) -> Generation:
        if self._started is None or self._finished is None:
            raise ServerError("the answer ended without its terminal event: client and server do not fit together")
        return Generation(
            request_id=self._started.request_id,
            adapter=_identity(self._started.adapter),
            choices=tuple(self._choice(choice) for choice in self._finished.choices),
            usage=_usage(self._finished.usage),
        )

    def _choice(self, finish: inference_pb2.ChoiceFinish) -> Choice:
        chunks = self._chunks.get(finish.index, [])
        return Choice(
            index=finish.index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
            finish_reason=_FINISH_REASONS.get(finish.reason, "unknown"),
            stop=finish.stop or None,
        )


def to_score(response: inference_pb2.ScoreResponse) -> Score:
    return Score(
        adapter=_identity(response.adapter),
        tokens=_logprobs(response.tokens),
        total_logprob=response.total_logprob,
        usage=_usage(response.usage),
    )


def to_adapter(message: adapters_pb2.Adapter) -> Adapter:
    residency = adapters_pb2.Residency.Name(message.residency).removeprefix("RESIDENCY_").lower()
    return _copied(Adapter, message, residency=residency)


def to_server_info(message: server_pb2.InfoResponse) -> ServerInfo:
    backbone, limits = _copied(BackboneInfo, message.backbone), _copied(Limits, message.limits)
    return _copied(ServerInfo, message, backbone=backbone, limits=limits)


def _copied(kind: type[D], message: Any, **converted: object) -> D:
    """A dataclass whose fields are named as the message's are."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: converted[name] if name in converted else getattr(message, name) for name in names})


def _identity(message: inference_pb2.AdapterIdentity) -> AdapterIdentity | None:
    return AdapterIdentity(name=message.name, content_hash=message.content_hash) if message.name else None


def _usage(message: inference_pb2.Usage) -> Usage:
    return _copied(Usage, message)


def _logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            token=message.token,
            logprob=message.logprob,
            top=tuple(_copied(TopLogprob, top) for top in message.top),
        )
        for message in messages
    )
