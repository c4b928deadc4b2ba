"""What leaves a call whose write failed, before and after gRPC has seen that its client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest

from polyhead_core.errors import InvalidRequest
from polyhead_server.service import edge


class Context:
    """Of a call whose client may go: what the interceptor asks of grpc's, and no more."""

    def __init__(self) -> None:
        self.gone = False
        self.status: grpc.StatusCode | None = None

    def done(self) -> bool:
        return self.gone

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object) -> NoReturn:
        self.status = code
        raise grpc.aio.AbortError


class Unreachable(Context):
    """To which no status can be sent either."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object) -> NoReturn:
        self.status = code
        raise grpc.aio.InternalError("Failed execute_batch")


def call(context: Context, error: Exception | None = None) -> asyncio.Task[object]:
    """A call that ends in `error`, or whose write fails, at once, as it runs behind the interceptor."""

    async def answer(request: object, context: object) -> NoReturn:
        raise error or grpc.aio.InternalError("Failed grpc_call_start_batch")

    async def continuation(details: object) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(answer)

    async def answered() -> object:
        details: Any = SimpleNamespace(method="/polyhead.v1.Inference/Generate")
        handler: Any = await edge.EdgeInterceptor().intercept_service(continuation, details)
        return await handler.unary_unary(object(), context)

    return asyncio.create_task(answered())


def outcome(seen: Callable[[Context, asyncio.Task[object]], object]) -> tuple[Context, object]:
    """Of such a call, and what gRPC does a moment after its write failed."""

    async def scenario() -> tuple[Context, object]:
        context = Context()
        task = call(context)
        await asyncio.sleep(0.05)
        seen(context, task)
        (raised,) = await asyncio.gather(task, return_exceptions=True)
        return context, raised

    return asyncio.run(scenario())


def gone(context: Context, _: asyncio.Task[object]) -> None:
    context.gone = True


def gone_and_cancelled(context: Context, task: asyncio.Task[object]) -> None:
    """As gRPC does when it sees that the client has gone."""
    context.gone = True
    task.cancel()


@pytest.mark.parametrize(
    ("seen", "raises", "wait_s"),
    [(gone_and_cancelled, asyncio.CancelledError, edge._CLIENT_GONE_S), (gone, grpc.aio.InternalError, 0.1)],
    ids=["cancelled while it waits", "seen after the wait"],
)
def test_a_write_that_fails_because_the_client_has_gone_is_no_failure(
    seen: Callable[[Context, asyncio.Task[object]], object],
    raises: type[BaseException],
    wait_s: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edge, "_CLIENT_GONE_S", wait_s)
    context, raised = outcome(seen)
    assert isinstance(raised, raises)
    assert context.status is None
    assert not caplog.records


def test_a_write_that_fails_while_the_client_stays_is_internal_and_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "_CLIENT_GONE_S", 0.05)
    context, raised = outcome(lambda *_: None)
    assert isinstance(raised, grpc.aio.AbortError)
    assert context.status is grpc.StatusCode.INTERNAL
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info


def test_a_status_that_fails_because_the_client_has_gone_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC would log what the handler raises before it has seen that the client is gone."""

    async def scenario() -> tuple[Context, object]:
        context = Unreachable()
        task = call(context, InvalidRequest("n = 0"))
        await asyncio.sleep(0.05)
        gone_and_cancelled(context, task)
        (raised,) = await asyncio.gather(task, return_exceptions=True)
        return context, raised

    context, raised = asyncio.run(scenario())
    assert context.status is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(raised, asyncio.CancelledError)
    assert not caplog.records
