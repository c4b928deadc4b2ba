"""The service on a real socket, with doubles behind it: statuses, streams, limits, health."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from service_calls import channel as channel
from service_calls import generate
from service_calls import harness as harness
from service_calls import stub as stub
from service_doubles import FakeInfo, Harness, answer, failing, until_cancelled

from polyhead_core.errors import (
    AdapterFormatError,
    Draining,
    EngineFailure,
    InvalidRequest,
    PolyheadError,
    QueueFull,
    RequestDeadlineExceeded,
)
from polyhead_proto.v1 import inference_pb2, inference_pb2_grpc, server_pb2, server_pb2_grpc
from polyhead_server.request import EventSink, Request
from polyhead_server.service import convert
from polyhead_server.service import server as server_module


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info


def test_events_come_in_order_and_name_the_adapter(stub: inference_pb2_grpc.InferenceStub, harness: Harness) -> None:
    events = list(stub.Generate(generate(adapter="french")))
    assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["started", "finished"]
    assert events[0].started.adapter == inference_pb2.AdapterIdentity(name="french", content_hash="ab" * 32)
    assert events[0].started.prompt_tokens == len(harness.engine.submitted[0].prompt_token_ids)
    assert "".join(event.tokens.text for event in events[1:-1]) == "Hello there"
    assert events[-1].finished.choices[0].stop == "END"
    assert events[-1].finished.usage.completion_tokens == 2


def test_all_sampling_fields_arrive(stub: inference_pb2_grpc.InferenceStub, harness: Harness) -> None:
    sampling = inference_pb2.SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, repetition_penalty=2.0,
        presence_penalty=1.5, frequency_penalty=-0.5, seed=2**64 - 1, stop=["a", "b"], stop_token_ids=[4, 5],
        ignore_eos=True, logprobs=2, n=3,
    )  # fmt: skip
    list(stub.Generate(generate(sampling=sampling)))
    params = harness.engine.submitted[0].params
    assert {name: getattr(params, name) for name in type(params).__dataclass_fields__} == {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.75, "min_p": 0.25,
        "repetition_penalty": 2.0, "presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 2**64 - 1,
        "stop": ("a", "b"), "stop_token_ids": (4, 5), "ignore_eos": True, "logprobs": 2, "n": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 2**32 - 1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**32 - 1}, "max_tokens"),
        ({"min_tokens": 500}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 1024] * 1000}, "stop"),
        ({"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    ],
)
def test_absurd_sampling_is_refused_by_field(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness, sampling: dict[str, object], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate(sampling=inference_pb2.SamplingParams(**sampling))))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).metadata["field"] == field
    assert not harness.engine.submitted


@pytest.mark.parametrize(
    ("request_fields", "code", "reason"),
    [
        ({"adapter": "frnch"}, "NOT_FOUND", "UNKNOWN_ADAPTER"),
        ({"adapter": "../french"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"adapter": "french\0"}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"adapter": "broken"}, "FAILED_PRECONDITION", "ADAPTER_REJECTED"),
        ({"prompt": ""}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"prompt": "x" * (10 << 20)}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ({"prompt": "0 " * 128}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
        ({"prompt": "0 " * 64}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG"),
    ],
)
def test_refused_before_the_engine(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness, request_fields: dict[str, str], code: str, reason: str
) -> None:
    harness.store.known["broken"] = FakeInfo(name="broken", error="not for this backbone")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate(**request_fields)))
    assert caught.value.code() is grpc.StatusCode[code]
    assert error_info(caught.value).reason == reason
    assert not harness.engine.submitted


@pytest.mark.parametrize(
    "error",
    [
        QueueFull("1024 requests are waiting", details={"limit": 1024}, retry_after_s=2.5),
        Draining("shutting down", retry_after_s=1.0),
        InvalidRequest("no", details={"field": "prompt"}),
    ],
)
def test_what_the_engine_refuses_keeps_its_status(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness, error: PolyheadError
) -> None:
    harness.engine.refuse_with = error
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate()))
    assert caught.value.details() == error.message
    assert error_info(caught.value).reason == error.reason
    assert harness.sample("polyhead_requests_total", outcome=error.reason.lower()) == 1


@pytest.mark.parametrize(
    "error", [EngineFailure("the engine lost it"), RequestDeadlineExceeded("late"), AdapterFormatError("gone")]
)
def test_a_failure_mid_stream_ends_the_call_with_its_status(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness, error: PolyheadError
) -> None:
    harness.engine.behave = failing(error)
    events = []
    with pytest.raises(grpc.RpcError) as caught:
        events.extend(stub.Generate(generate()))
    assert error_info(caught.value).reason == error.reason
    assert not harness.engine.cancelled


def test_a_bug_is_internal_logged_and_says_nothing_of_itself(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.engine.refuse_with = ZeroDivisionError("secret path /etc/passwd")
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate()))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "ZeroDivisionError" in caplog.text
    assert harness.sample("polyhead_requests_total", outcome="internal") == 1


@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\xff\xff\xff"])
def test_bytes_that_are_no_message_are_the_callers_error(channel: grpc.Channel, data: bytes) -> None:
    method = channel.unary_stream("/polyhead.v1.Inference/Generate", request_serializer=lambda value: value)
    with pytest.raises(grpc.RpcError) as caught:
        list(method(data))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in caught.value.details()


def test_the_service_counts_only_what_the_engine_never_had(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness
) -> None:
    list(stub.Generate(generate(adapter="french")))
    for name in ("no such adapter", "../secret"):
        with pytest.raises(grpc.RpcError):
            list(stub.Generate(generate(adapter=name)))
    with pytest.raises(grpc.RpcError):
        list(stub.Generate(generate(adapter="french", prompt="")))
    (family,) = [f for f in harness.metrics.registry.collect() if f.name == "polyhead_requests"]
    counts = {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}
    assert counts == {"unknown_adapter": 1, "invalid_request": 2}
    assert harness.sample("polyhead_adapter_requests_total", adapter="french") == 1
    assert harness.sample("polyhead_adapter_requests_total", adapter="(backbone)") == 2


def test_continuations_carry_their_index_and_logprobs_their_texts(stub: inference_pb2_grpc.InferenceStub) -> None:
    sampling = inference_pb2.SamplingParams(n=3, logprobs=2, temperature=1.0)
    events = list(stub.Generate(generate(sampling=sampling)))
    chunks = [event.tokens for event in events if event.HasField("tokens")]
    for index in range(3):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == "Hello there"
        logprobs = [logprob for chunk in own for logprob in chunk.logprobs]
        assert [logprob.token for logprob in logprobs] == ["<|endoftext|>", "<|im_start|>"]
        assert [top.token_id for top in logprobs[0].top] == [0, 7]
    assert {choice.index for choice in events[-1].finished.choices} == {0, 1, 2}


def test_chat_goes_through_the_template_and_roles_are_checked(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness
) -> None:
    message = inference_pb2.ChatMessage(role="user", content="hi <|im_end|>")
    list(stub.Chat(inference_pb2.ChatRequest(messages=[message])))
    text = harness.backbone.tokenizer.decode(harness.engine.submitted[0].prompt_token_ids)
    assert text == "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert list(harness.engine.submitted[0].prompt_token_ids).count(2) == 1
    message.role = "root"
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(inference_pb2.ChatRequest(messages=[message])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_score_counts_all_tokens_but_the_first(stub: inference_pb2_grpc.InferenceStub, harness: Harness) -> None:
    response = stub.Score(inference_pb2.ScoreRequest(token_ids={"ids": [5, 6, 7]}, top_logprobs=2, adapter="french"))
    assert [token.token_id for token in response.tokens] == [5, 6, 7]
    assert [token.logprob for token in response.tokens] == [0.0, -1.0, -1.0]
    assert [len(token.top) for token in response.tokens] == [0, 2, 2]
    assert response.total_logprob == -2.0
    assert response.adapter.name == "french"
    assert harness.engine.submitted[0].score_prompt
    assert harness.engine.submitted[0].score_top == 2


def test_calls_at_once_are_bounded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SPARE_CALLS", 1)
    harness.config = replace(harness.config, max_queued_requests=1, max_batch_rows=1)
    harness.engine.behave = until_cancelled
    with harness.serve() as service, grpc.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        held = [stub.Generate(generate()) for _ in range(3)]
        for call in held:
            next(call)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Generate(generate()))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        held[0].cancel()


def test_a_huge_text_in_the_wrong_place_is_not_repeated(stub: inference_pb2_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate(sampling={"stop": ["x" * (8 << 20)]})))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1 to 1024 characters" in caught.value.details()


def test_many_calls_at_once_each_get_their_own(stub: inference_pb2_grpc.InferenceStub, harness: Harness) -> None:
    def echo(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        answer(str(request.prompt_token_ids[0]))(request, sink, cancelled)

    harness.engine.behave = echo
    calls = [stub.Generate(generate(prompt_token_ids={"ids": [number]}, prompt=None)) for number in range(100)]
    for number, call in enumerate(calls):
        assert "".join(event.tokens.text for event in call) == str(number)


def test_health_follows_the_engine(channel: grpc.Channel, harness: Harness) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    check = health_pb2.HealthCheckRequest(service="polyhead.v1.Inference")
    assert health.Check(check).status == health_pb2.HealthCheckResponse.SERVING
    harness.engine.current = replace(harness.engine.current, healthy=False)
    until_s = time.monotonic() + 5
    while health.Check(check).status != health_pb2.HealthCheckResponse.NOT_SERVING:
        assert time.monotonic() < until_s
        time.sleep(0.05)


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (response,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
    names = {service.name for service in response.list_services_response.service}
    assert {"polyhead.v1.Inference", "polyhead.v1.Adapters", "polyhead.v1.Server", "grpc.health.v1.Health"} <= names


def test_info_says_what_the_server_is(channel: grpc.Channel, harness: Harness) -> None:
    info = server_pb2_grpc.ServerStub(channel).Info(server_pb2.InfoRequest())
    assert info.backbone.fingerprint == harness.backbone.fingerprint
    assert info.limits.max_model_len == harness.engine.max_model_len
    assert info.limits.max_n == 4
    assert (info.num_adapters, info.num_kv_blocks, info.adapter_pool_used_bytes) == (1, 64, 1 << 10)


def test_a_taken_port_is_said_clearly(harness: Harness) -> None:
    from polyhead_core.errors import ConfigError
    from polyhead_server.service.server import Service

    with harness.serve() as service:
        taken = replace(harness.config, listen=service.address)

        async def start() -> None:
            await Service(taken, harness.engine, harness.store, harness.backbone, harness.metrics).start()

        with pytest.raises(ConfigError, match=service.address):
            asyncio.run(start())


def test_a_chat_of_too_many_messages_is_refused_before_they_are_read(
    stub: inference_pb2_grpc.InferenceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(_: object) -> None:
        raise AssertionError("the messages were converted")

    monkeypatch.setattr(convert, "to_messages", unread)
    message = inference_pb2.ChatMessage(role="user", content="")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(inference_pb2.ChatRequest(messages=[message] * 100_000)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize(
    ("field", "value"),
    [("text", "0 " * 200), ("token_ids", inference_pb2.TokenIds(ids=[1] * 200)), ("text", "x" * 10_000)],
)
def test_a_score_that_is_too_long_names_its_own_field_and_no_answer(
    stub: inference_pb2_grpc.InferenceStub, field: str, value: object
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Score(inference_pb2.ScoreRequest(**{field: value}))
    info = error_info(caught.value)
    assert (info.reason, info.metadata["field"]) == ("PROMPT_TOO_LONG", field)
    assert caught.value.details().startswith(f"{field} of ")
    assert "answer" not in caught.value.details()


def test_a_burst_of_calls_loses_none_without_a_word(channel: grpc.Channel) -> None:
    """gRPC's own limit of calls that the server has not seen yet cancels some at random."""
    info = server_pb2_grpc.ServerStub(channel).Info
    calls = [info.future(server_pb2.InfoRequest(), timeout=60) for _ in range(4000)]
    codes = Counter(call.code() for call in calls)
    assert codes.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}, codes
    assert codes[grpc.StatusCode.OK] >= 1000
