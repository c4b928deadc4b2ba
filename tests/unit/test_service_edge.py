"""What leaves a call whose write failed, before and after gRPC has seen that its client is gone."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest

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


def call(context: Context) -> asyncio.Task[object]:
    """A call whose write fails at once, as it runs behind the interceptor."""

    async def answer(request: object, context: object) -> NoReturn:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    async def continuation(details: object) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(answer)

    async def answered() -> object:
        details: Any = SimpleNamespace(method="/polyhead.v1.Inference/Generate")
        handler: Any = await edge.EdgeInterceptor().intercept_service(continuation, details)
        return await handler.unary_unary(object(), context)

    return asyncio.create_task(answered())


def test_a_write_that_fails_before_grpc_cancels_the_call_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> Context:
        context = Context()
        task = call(context)
        await asyncio.sleep(0.05)
        context.gone = True
        task.cancel()  # As gRPC does when it sees that the client has gone.
        with pytest.raises(asyncio.CancelledError):
            await task
        return context

    assert asyncio.run(scenario()).status is None
    assert not caplog.records


def test_a_client_seen_gone_after_the_wait_is_no_failure_either(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "_CLIENT_GONE_S", 0.1)

    async def scenario() -> Context:
        context = Context()
        task = call(context)
        await asyncio.sleep(0.05)
        context.gone = True
        with pytest.raises(grpc.aio.InternalError):
            await task
        return context

    assert asyncio.run(scenario()).status is None
    assert not caplog.records


def test_a_write_that_fails_while_the_client_stays_is_internal_and_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "_CLIENT_GONE_S", 0.05)

    async def scenario() -> Context:
        context = Context()
        with pytest.raises(grpc.aio.AbortError):
            await call(context)
        return context

    assert asyncio.run(scenario()).status is grpc.StatusCode.INTERNAL
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
