"""The outermost layer of every call: bytes that are no message, and errors of all kinds, leave as a proper status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from polyhead_core.errors import EngineFailure, InvalidRequest, PolyheadError
from polyhead_server.service.status import to_status

_log = logging.getLogger(__name__)

_PACKAGE_PREFIX = "/polyhead.v1."
_CLIENT_GONE_S = 1.0
"""Within which gRPC cancels the call of a client to which a write failed because it had gone."""

Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


class _Undecodable:
    """Stands in for a request whose bytes are not its message."""


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of Polyhead's own services, so that no servicer can forget to map its errors."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PACKAGE_PREFIX):
            return handler  # type: ignore[no-any-return]
        make, inner = (
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
        )
        return make(
            _guarded(inner, handler_call_details.method),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    # gRPC answers an exception here with INTERNAL, as if it were our fault.
    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError):
            return _Undecodable()

    return tolerant


def _guarded(inner: Handler, method: str) -> Handler:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if isinstance(request, _Undecodable):
                raise InvalidRequest("the request's bytes are not the method's message: a text must be valid UTF-8")
            return await inner(request, context)
        except PolyheadError as error:
            await _abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if isinstance(error, grpc.aio.InternalError) and not context.done():
                # A write fails when the client has gone; gRPC may see that a moment later, and cancels this call.
                await asyncio.sleep(_CLIENT_GONE_S)
            if context.done():
                # Writing to a client that has gone raises whatever gRPC finds fit.
                _log.debug("%s: the client had gone: %s", method, error)
                raise
            _log.exception("%s failed", method)
            await _abort(context, EngineFailure("internal error: the server's log has the details"))

    return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: PolyheadError) -> NoReturn:
    status = to_status(error)
    try:
        await context.abort(status.code, status.details or "", status.trailing_metadata or ())
    except grpc.aio.InternalError:
        # Like a write: where the client has gone, gRPC sees it a moment later and cancels this call.
        await asyncio.sleep(_CLIENT_GONE_S)
        raise
