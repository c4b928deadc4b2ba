"""Generate, Chat and Score: one call from its message to the engine and back. Never touches a tensor or a disk."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from polyhead_core.errors import PolyheadError, RequestDeadlineExceeded
from polyhead_proto.v1 import inference_pb2, inference_pb2_grpc
from polyhead_server.config import ServerConfig
from polyhead_server.metrics import Metrics
from polyhead_server.request import AdapterVersion, FailedEvent, FinishedEvent, Request, SamplingParams
from polyhead_server.service import convert
from polyhead_server.service.adapter_lookup import AdapterLookup
from polyhead_server.service.output import OutputStream
from polyhead_server.service.ports import Engine
from polyhead_server.service.prompts import PromptEncoder, TokenTexts
from polyhead_server.tenancy.tenant import resolve_tenant

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

# Work on more than this leaves the event loop: both take about 2 ms.
_MAX_TEXT_BYTES_ON_LOOP = 4096
_MAX_LOGPROBS_ON_LOOP = 512


@dataclass(kw_only=True)
class _Account:
    """What is known of one call before the engine has it."""

    adapter: str = ""
    deadline_s: float | None = None
    is_admitted: bool = False
    """From here on the engine counts it."""


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        lookup: AdapterLookup,
        encoder: PromptEncoder,
        texts: TokenTexts,
        metrics: Metrics,
        executor: Executor,
    ) -> None:
        self._config = config
        self._engine = engine
        self._lookup = lookup
        self._encoder = encoder
        self._texts = texts
        self._metrics = metrics
        self._executor = executor

    async def Generate(self, message: inference_pb2.GenerateRequest, context: Context) -> None:
        with self._accounted(context, message.adapter) as account:
            params = self._params(message.sampling)
            if message.WhichOneof("input") == "prompt_token_ids":
                field, token_ids = "prompt_token_ids", self._encoder.check_token_ids(message.prompt_token_ids.ids)
            else:
                field, token_ids = "prompt", await self._encode("prompt", message.prompt, message.parse_special_tokens)
            self._encoder.check_room(token_ids, field)
            version = await self._adapter(message.adapter, account)
            await self._stream(self._request(context, account, version, token_ids, params), context, account)

    async def Chat(self, message: inference_pb2.ChatRequest, context: Context) -> None:
        with self._accounted(context, message.adapter) as account:
            params = self._params(message.sampling)
            self._encoder.check_num_messages(len(message.messages))
            messages = convert.to_messages(message.messages)
            is_large = message.ByteSize() > _MAX_TEXT_BYTES_ON_LOOP
            token_ids = await self._off_loop_if(is_large, lambda: self._encoder.encode_chat(messages))
            self._encoder.check_room(token_ids, "messages")
            version = await self._adapter(message.adapter, account)
            await self._stream(self._request(context, account, version, token_ids, params), context, account)

    async def Score(self, message: inference_pb2.ScoreRequest, context: Context) -> inference_pb2.ScoreResponse:
        with self._accounted(context, message.adapter) as account:
            convert.check_top_logprobs(message.top_logprobs, self._config.max_logprobs)
            if message.WhichOneof("input") == "token_ids":
                token_ids = self._encoder.check_token_ids(message.token_ids.ids, field="token_ids")
            else:
                token_ids = await self._encode("text", message.text, message.parse_special_tokens)
            version = await self._adapter(message.adapter, account)
            request = self._request(context, account, version, token_ids, SamplingParams(), message.top_logprobs)
            async with self._submitted(request, account) as output:
                end = None
                while end is None:
                    _, end = await output.read()
            finished = _succeeded(end)
            is_large = len(token_ids) * (1 + message.top_logprobs) > _MAX_LOGPROBS_ON_LOOP
            return await self._off_loop_if(
                is_large, lambda: convert.to_score_response(finished, token_ids, version, self._texts)
            )

    async def _stream(self, request: Request, context: Context, account: _Account) -> None:
        async with self._submitted(request, account) as output:
            # Apart from the first event: given up together with it they would come a second time with the status, which
            # gRPC refuses to send then.
            await context.send_initial_metadata(())
            await self._write(
                context, convert.started(request.request_id, request.adapter, len(request.prompt_token_ids))
            )
            end = None
            num_logprobs = 1 + (request.params.logprobs or 0)
            while end is None:
                chunks, end = await output.read()
                for chunk in chunks:
                    is_large = len(chunk.logprobs) * num_logprobs > _MAX_LOGPROBS_ON_LOOP
                    await self._write(
                        context, await self._off_loop_if(is_large, convert.from_tokens, chunk, self._texts)
                    )
            await self._write(context, convert.from_finished(_succeeded(end)))

    async def _write(self, context: Context, message: object) -> None:
        """Returns once the connection has taken `message`; raises RequestDeadlineExceeded if its client reads nothing.

        Without that, what a request has come to would be held for as long as its client keeps the connection.
        """
        try:
            async with asyncio.timeout(self._config.reader_timeout_s):
                await context.write(message)
        except TimeoutError as error:
            waited = f"for {self._config.reader_timeout_s:g} s"
            raise RequestDeadlineExceeded(f"nothing of the answer was read {waited}: read it as it comes") from error

    @contextlib.asynccontextmanager
    async def _submitted(self, request: Request, account: _Account) -> AsyncIterator[OutputStream]:
        """Hands `request` to the engine, and takes it back when the call ends first, for whatever reason."""
        output = OutputStream(asyncio.get_running_loop())
        self._engine.submit(request, output.put)
        account.is_admitted = True
        try:
            yield output
        finally:
            if not output.has_ended:
                self._engine.cancel(request.request_id)

    @contextlib.contextmanager
    def _accounted(self, context: Context, adapter: str) -> Iterator[_Account]:
        """Counts the call under its outcome if it ends before the engine has admitted it, for whatever reason."""
        left_s = context.time_remaining()
        # Only a name that exists may become a label.
        label = adapter if self._lookup.knows(adapter) else ""
        account = _Account(adapter=label, deadline_s=None if left_s is None else time.monotonic() + left_s)
        outcome = "internal"
        try:
            yield account
        except PolyheadError as error:
            outcome = error.reason.lower()
            raise
        except asyncio.CancelledError:
            # gRPC cancels the handler when the client goes and when the deadline passes.
            is_late = account.deadline_s is not None and time.monotonic() >= account.deadline_s
            outcome = "deadline" if is_late else "cancelled"
            raise
        finally:
            if not account.is_admitted:
                self._metrics.request_ended(outcome, account.adapter, prompt_tokens=0, completion_tokens=0)

    def _params(self, message: inference_pb2.SamplingParams) -> SamplingParams:
        return convert.to_params(message, max_n=self._config.max_n, max_logprobs=self._config.max_logprobs)

    async def _adapter(self, name: str, account: _Account) -> AdapterVersion | None:
        version = await self._lookup.resolve(name)
        account.adapter = name
        return version

    async def _encode(self, field: str, text: str, parse_special_tokens: bool) -> tuple[int, ...]:
        is_large = len(text) > _MAX_TEXT_BYTES_ON_LOOP
        return await self._off_loop_if(
            is_large, lambda: self._encoder.encode_prompt(text, parse_special_tokens=parse_special_tokens, field=field)
        )

    async def _off_loop_if(self, is_large: bool, function: Callable[..., T], *args: Any) -> T:
        if not is_large:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _request(
        self,
        context: Context,
        account: _Account,
        version: AdapterVersion | None,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        score_top: int | None = None,
    ) -> Request:
        """With `score_top`: a request that scores its prompt and generates nothing."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return Request(
            request_id=uuid.uuid4().hex,
            tenant=resolve_tenant(metadata).name,
            prompt_token_ids=token_ids,
            params=params,
            adapter=version,
            arrival_s=time.monotonic(),
            deadline_s=account.deadline_s,
            score_prompt=score_top is not None,
            score_top=score_top or 0,
        )


def _succeeded(end: FinishedEvent | FailedEvent) -> FinishedEvent:
    if isinstance(end, FailedEvent):
        raise end.error
    return end
