"""Every error class leaves with its code, its details, and headers that gRPC accepts."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from polyhead_core import errors
from polyhead_server.service.status import ERROR_DOMAIN, code_of, to_status

CODES = {
    "InvalidRequest": "INVALID_ARGUMENT",
    "PromptTooLong": "INVALID_ARGUMENT",
    "UnknownAdapter": "NOT_FOUND",
    "AdapterRejected": "FAILED_PRECONDITION",
    "AdapterFormatError": "FAILED_PRECONDITION",
    "AdapterMismatch": "FAILED_PRECONDITION",
    "AdapterTooLarge": "FAILED_PRECONDITION",
    "AdapterInUse": "FAILED_PRECONDITION",
    "QueueFull": "RESOURCE_EXHAUSTED",
    "Draining": "UNAVAILABLE",
    "RequestDeadlineExceeded": "DEADLINE_EXCEEDED",
    "RequestCancelled": "CANCELLED",
    "EngineFailure": "INTERNAL",
    "BackboneError": "INTERNAL",
    "ConfigError": "INTERNAL",
    "PolyheadError": "INTERNAL",
}


def all_errors() -> set[type[errors.PolyheadError]]:
    found, todo = set(), [errors.PolyheadError]
    while todo:
        kind = todo.pop()
        found.add(kind)
        todo += kind.__subclasses__()
    return {kind for kind in found if kind.__module__ == errors.__name__}


def test_the_expected_codes_cover_the_tree() -> None:
    assert {kind.__name__ for kind in all_errors()} == set(CODES)


def test_the_table_in_errors_is_the_table_in_status() -> None:
    for name, code in CODES.items():
        for line in (errors.__doc__ or "").splitlines():
            if f" {name} " in line and code != "INTERNAL":
                assert code in line or name in ("AdapterFormatError", "AdapterMismatch", "AdapterTooLarge"), line


@pytest.mark.parametrize("kind", sorted(all_errors(), key=lambda kind: kind.__name__))
def test_code_and_details(kind: type[errors.PolyheadError]) -> None:
    error = kind("what went wrong", details={"field": "top_p", "given": 7}, retry_after_s=1.25)
    assert code_of(error) is grpc.StatusCode[CODES[kind.__name__]]
    status = to_status(error)
    ((_, data),) = status.trailing_metadata
    rich = status_pb2.Status.FromString(data)
    assert rich.message == status.details == "what went wrong"
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(info)
    assert rich.details[1].Unpack(bad)
    assert rich.details[2].Unpack(retry)
    assert (info.reason, info.domain) == (kind.reason, ERROR_DOMAIN)
    assert dict(info.metadata) == {"field": "top_p", "given": "7"}
    assert bad.field_violations[0].field == "top_p"
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.25


def test_without_field_and_retry_there_is_only_error_info() -> None:
    status = to_status(errors.UnknownAdapter("x"))
    rich = status_pb2.Status.FromString(status.trailing_metadata[0][1])
    assert len(rich.details) == 1


@pytest.mark.parametrize("filler", ["x", "é", "🙂", "\n", "\ud800"])
def test_whatever_users_send_back_fits_the_headers(filler: str) -> None:
    details = {f"key{number}": filler * 10_000 for number in range(50)}
    status = to_status(errors.InvalidRequest(filler * 100_000, details={"field": filler * 9, **details}))
    percent_encoded = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.details.encode())
    in_base64 = len(status.trailing_metadata[0][1]) * 4 / 3
    assert percent_encoded + in_base64 < 7000
