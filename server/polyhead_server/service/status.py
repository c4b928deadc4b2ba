"""How an error leaves on the wire: one table from error class to gRPC code, and google.rpc details beside it."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from polyhead_core.errors import (
    AdapterInUse,
    AdapterRejected,
    Draining,
    EngineFailure,
    InvalidRequest,
    PolyheadError,
    QueueFull,
    RequestCancelled,
    RequestDeadlineExceeded,
    UnknownAdapter,
)

ERROR_DOMAIN = "polyhead.dev"

# An error takes the row of its nearest ancestor; one without a row is our own bug and INTERNAL.
CODES: dict[type[PolyheadError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownAdapter: grpc.StatusCode.NOT_FOUND,
    AdapterRejected: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterInUse: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    RequestDeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    EngineFailure: grpc.StatusCode.INTERNAL,
}

# A status travels in HTTP/2 headers, of which gRPC takes 8 KiB in all, percent-encoded or in base64. Errors quote what
# users sent, so every text is cut.
MAX_MESSAGE_BYTES = 512
MAX_DETAIL_BYTES = 160
MAX_DETAILS = 8


def code_of(error: PolyheadError) -> grpc.StatusCode:
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def to_status(error: PolyheadError) -> grpc.Status:
    """The gRPC status of `error`: its code and message, ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    for detail in _details(error, message):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)  # type: ignore[no-any-return]


def _details(error: PolyheadError, message: str) -> list[Message]:
    kept = dict(list(error.details.items())[:MAX_DETAILS])
    metadata = {key: _cut(value, MAX_DETAIL_BYTES) for key, value in kept.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)]
    if "field" in metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=_cut(message, MAX_DETAIL_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode("utf-8")
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "..."
