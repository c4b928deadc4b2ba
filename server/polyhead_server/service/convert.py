"""The only place that knows both protobuf messages and the server's own types. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

from polyhead_core.errors import InvalidRequest
from polyhead_proto.v1 import adapters_pb2, inference_pb2
from polyhead_server.request import (
    AdapterVersion,
    FinishedEvent,
    FinishReason,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from polyhead_server.service.ports import AdapterInfo
from polyhead_server.service.prompts import ChatMessage, TokenTexts

_OPTIONAL_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "logprobs", "n",
)  # fmt: skip

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def to_params(message: inference_pb2.SamplingParams, *, max_n: int, max_logprobs: int) -> SamplingParams:
    """Raises InvalidRequest naming the first unusable field."""
    given = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    params = SamplingParams(**given, stop=tuple(message.stop[:17]), stop_token_ids=tuple(message.stop_token_ids[:65]))
    _check_limit("n", params.n, max_n)
    _check_limit("logprobs", params.logprobs or 0, max_logprobs)
    return params


def check_top_logprobs(given: int, max_logprobs: int) -> None:
    _check_limit("top_logprobs", given, max_logprobs)


def _check_limit(field: str, given: int, limit: int) -> None:
    if given > limit:
        raise InvalidRequest(
            f"{field} = {given} is more than this server allows: expected at most {limit}",
            details={"field": field, "given": given, "limit": limit},
        )


def to_messages(messages: Sequence[inference_pb2.ChatMessage]) -> list[ChatMessage]:
    return [ChatMessage(role=message.role, content=message.content) for message in messages]


def from_version(version: AdapterVersion | None) -> inference_pb2.AdapterIdentity:
    if version is None:
        return inference_pb2.AdapterIdentity()
    return inference_pb2.AdapterIdentity(name=version.name, content_hash=version.content_hash)


def started(request_id: str, version: AdapterVersion | None, num_prompt_tokens: int) -> inference_pb2.GenerateEvent:
    return inference_pb2.GenerateEvent(
        started=inference_pb2.Started(
            request_id=request_id, adapter=from_version(version), prompt_tokens=num_prompt_tokens
        )
    )


def from_tokens(event: TokensEvent, texts: TokenTexts) -> inference_pb2.GenerateEvent:
    return inference_pb2.GenerateEvent(
        tokens=inference_pb2.TokenChunk(
            index=event.index,
            text=event.text,
            token_ids=event.token_ids,
            logprobs=[from_logprob(logprob, texts) for logprob in event.logprobs],
        )
    )


def from_finished(event: FinishedEvent) -> inference_pb2.GenerateEvent:
    choices = [
        inference_pb2.ChoiceFinish(index=choice.index, reason=_FINISH_REASONS[choice.reason], stop=choice.stop or "")
        for choice in event.choices
    ]
    return inference_pb2.GenerateEvent(finished=inference_pb2.Finished(choices=choices, usage=from_usage(event.usage)))


def from_usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def from_logprob(logprob: TokenLogprob, texts: TokenTexts) -> inference_pb2.TokenLogprob:
    top = [
        inference_pb2.TopLogprob(token_id=token_id, token=texts.text(token_id), logprob=value)
        for token_id, value in logprob.top
    ]
    return inference_pb2.TokenLogprob(
        token_id=logprob.token_id, token=texts.text(logprob.token_id), logprob=logprob.logprob, top=top
    )


def to_score_response(
    event: FinishedEvent, token_ids: Sequence[int], version: AdapterVersion | None, texts: TokenTexts
) -> inference_pb2.ScoreResponse:
    first = inference_pb2.TokenLogprob(token_id=token_ids[0], token=texts.text(token_ids[0]))
    return inference_pb2.ScoreResponse(
        adapter=from_version(version),
        tokens=[first, *(from_logprob(logprob, texts) for logprob in event.prompt_logprobs)],
        total_logprob=sum(logprob.logprob for logprob in event.prompt_logprobs),
        usage=from_usage(event.usage),
    )


def from_adapter_info(info: AdapterInfo) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=info.name,
        content_hash=info.content_hash,
        peft_type=info.peft_type,
        max_rank=info.max_rank,
        num_parameters=info.num_parameters,
        file_bytes=info.file_bytes,
        device_bytes=info.device_bytes,
        residency=f"RESIDENCY_{info.residency.name}",
        pinned=info.pinned,
        active_requests=info.active_requests,
        error=info.error,
    )
