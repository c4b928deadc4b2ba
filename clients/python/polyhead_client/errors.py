"""Every error the client raises, as one tree, and how a gRPC error becomes one of them.

PolyheadClientError
├── InvalidRequest        INVALID_ARGUMENT, or refused before the wire
│   └── PromptTooLong
├── UnknownAdapter        NOT_FOUND
├── AdapterRejected       FAILED_PRECONDITION
├── AdapterInUse          FAILED_PRECONDITION: by requests, or pinned
├── ResourceExhausted     RESOURCE_EXHAUSTED
│   └── QueueFull         with retry_after_s
├── Unavailable           UNAVAILABLE: the server is there, but drains, or did not take the call
│   └── ConnectionFailed  no server answered
├── DeadlineExceeded      DEADLINE_EXCEEDED
├── Cancelled             CANCELLED; the client was closed
└── ServerError           INTERNAL and all else: not the caller's fault
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_STATUS_KEY = "grpc-status-details-bin"


class PolyheadClientError(Exception):
    """`reason` and `details` come from the server's ErrorInfo; both are empty where the error arose on this side."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        details: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        code: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s
        """Where the server gave one: when trying again can help."""
        self.code = code


class InvalidRequest(PolyheadClientError):
    pass


class PromptTooLong(InvalidRequest):
    pass


class UnknownAdapter(PolyheadClientError):
    pass


class AdapterRejected(PolyheadClientError):
    pass


class AdapterInUse(PolyheadClientError):
    pass


class ResourceExhausted(PolyheadClientError):
    pass


class QueueFull(ResourceExhausted):
    pass


class Unavailable(PolyheadClientError):
    pass


class ConnectionFailed(Unavailable):
    pass


class DeadlineExceeded(PolyheadClientError):
    pass


class Cancelled(PolyheadClientError):
    pass


class ServerError(PolyheadClientError):
    pass


_BY_REASON: dict[str, type[PolyheadClientError]] = {
    "PROMPT_TOO_LONG": PromptTooLong,
    "ADAPTER_IN_USE": AdapterInUse,
    "QUEUE_FULL": QueueFull,
    "DRAINING": Unavailable,
}

_BY_CODE: dict[grpc.StatusCode, type[PolyheadClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownAdapter,
    grpc.StatusCode.FAILED_PRECONDITION: AdapterRejected,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    # gRPC's own: nothing of Polyhead's answered.
    grpc.StatusCode.UNAVAILABLE: ConnectionFailed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turns gRPC's errors into this module's."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    except (ValueError, grpc.aio.UsageError) as error:
        if "closed" not in str(error).lower():
            raise
        # What gRPC says to a call on a channel that had been closed, by another thread perhaps.
        raise Cancelled("the client was closed") from error


def from_rpc_error(error: Any) -> PolyheadClientError:
    """`error` is the RpcError of a sync or an asyncio call."""
    code: grpc.StatusCode = error.code()
    reason, details, retry_after_s = _rich_details(error.trailing_metadata() or ())
    kind = _BY_REASON.get(reason) or _BY_CODE.get(code, ServerError)
    message = error.details() or code.name
    if code is grpc.StatusCode.CANCELLED and message == code.name and not reason:
        # Nobody cancelled it here: it came to a server whose gRPC gave it up before anything of Polyhead's saw it.
        kind, message = Unavailable, "the server did not take the call: it is overloaded, or shutting down"
    return kind(message, reason=reason, details=details, retry_after_s=retry_after_s, code=code)


def _rich_details(trailing_metadata: Any) -> tuple[str, dict[str, str], float | None]:
    status = status_pb2.Status()
    for key, value in trailing_metadata:
        if key == _STATUS_KEY:
            status.ParseFromString(value)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return info.reason, dict(info.metadata), retry_after_s
