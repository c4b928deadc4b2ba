"""Every error a user of Polyhead can cause, as one tree. Knows nothing of gRPC: the service maps `code` to a status.

PolyheadError
├── InvalidRequest            INVALID_ARGUMENT     a field of the request is unusable
│   └── PromptTooLong         INVALID_ARGUMENT     carries both numbers
├── UnknownAdapter            NOT_FOUND            never answered by the backbone instead
├── AdapterRejected           FAILED_PRECONDITION  an adapter directory that cannot be served
│   ├── AdapterFormatError                         truncated, pickled, unknown keys, not a number
│   ├── AdapterMismatch                            made for another backbone, or of another shape
│   └── AdapterTooLarge                            does not fit the pool or the rank limit at all
├── AdapterInUse              FAILED_PRECONDITION  what was asked must wait until it is not
├── QueueFull                 RESOURCE_EXHAUSTED   carries a retry hint
├── Draining                  UNAVAILABLE          the server is shutting down
├── RequestDeadlineExceeded   DEADLINE_EXCEEDED
├── RequestCancelled          CANCELLED
├── EngineFailure             INTERNAL             our bug; the request is lost, the server says so
├── BackboneError             (start-up)           a backbone that cannot be loaded
└── ConfigError               (start-up)           a setting that cannot be used
"""

from __future__ import annotations

from collections.abc import Mapping


class PolyheadError(Exception):
    """Base of all errors with a user-facing message.

    `reason` is a stable UPPER_SNAKE identifier, `details` are strings for machines,
    `retry_after_s` is set where trying again later can help.
    """

    reason = "POLYHEAD_ERROR"

    def __init__(
        self, message: str, *, details: Mapping[str, object] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = {key: str(value) for key, value in (details or {}).items()}
        self.retry_after_s = retry_after_s


class InvalidRequest(PolyheadError):
    reason = "INVALID_REQUEST"


class PromptTooLong(InvalidRequest):
    reason = "PROMPT_TOO_LONG"


class UnknownAdapter(PolyheadError):
    reason = "UNKNOWN_ADAPTER"


class AdapterRejected(PolyheadError):
    reason = "ADAPTER_REJECTED"


class AdapterFormatError(AdapterRejected):
    reason = "ADAPTER_FORMAT"


class AdapterMismatch(AdapterRejected):
    reason = "ADAPTER_MISMATCH"


class AdapterTooLarge(AdapterRejected):
    reason = "ADAPTER_TOO_LARGE"


class AdapterInUse(PolyheadError):
    reason = "ADAPTER_IN_USE"


class QueueFull(PolyheadError):
    reason = "QUEUE_FULL"


class Draining(PolyheadError):
    reason = "DRAINING"


class RequestDeadlineExceeded(PolyheadError):
    reason = "DEADLINE_EXCEEDED"


class RequestCancelled(PolyheadError):
    reason = "CANCELLED"


class EngineFailure(PolyheadError):
    reason = "ENGINE_FAILURE"


class BackboneError(PolyheadError):
    reason = "BACKBONE"


class ConfigError(PolyheadError):
    reason = "CONFIG"
