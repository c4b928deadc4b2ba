"""Callers that leave, read slowly or wait: what they began ends with them, and holds up nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
from service_calls import channel as channel
from service_calls import generate
from service_calls import harness as harness
from service_calls import stub as stub
from service_doubles import Harness, finished, tokens, until_cancelled

from polyhead_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from polyhead_server.request import EventSink, Request
from polyhead_server.service import adapters as adapters_service


def test_a_client_that_vanishes_cancels_its_request(harness: Harness) -> None:
    harness.engine.behave = until_cancelled
    with harness.serve() as service:
        channel = grpc.insecure_channel(service.address)
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate(adapter="french"))
        assert next(call).HasField("started")
        assert next(call).tokens.text == "first"
        channel.close()
        harness.engine.wait_for_cancel()
        assert harness.engine.cancelled == [harness.engine.submitted[0].request_id]


def test_a_client_that_vanishes_while_it_does_not_read_cancels_too(harness: Harness) -> None:
    def flood(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        while not cancelled.is_set():
            sink(tokens(0, "x" * 10_000, 1))
            time.sleep(0.001)
        sink(finished(request))

    harness.engine.behave = flood
    with harness.serve() as service:
        channel = grpc.insecure_channel(service.address)
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate())
        next(call)
        time.sleep(0.5)
        channel.close()
        harness.engine.wait_for_cancel()


def test_a_cancelled_score_cancels_its_request(harness: Harness) -> None:
    harness.engine.behave = until_cancelled
    with harness.serve() as service, grpc.insecure_channel(service.address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Score.future(inference_pb2.ScoreRequest(text="hello"))
        time.sleep(0.3)
        call.cancel()
        harness.engine.wait_for_cancel()


def test_a_deadline_reaches_the_engine_and_ends_the_call(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness
) -> None:
    harness.engine.behave = until_cancelled
    began_s = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(generate(), timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    harness.engine.wait_for_cancel()
    deadline_s = harness.engine.submitted[0].deadline_s
    assert deadline_s is not None
    assert 0.3 < deadline_s - began_s < 0.7


def test_without_a_deadline_there_is_none(stub: inference_pb2_grpc.InferenceStub, harness: Harness) -> None:
    list(stub.Generate(generate()))
    assert harness.engine.submitted[0].deadline_s is None


def test_a_slow_reader_gets_everything_and_the_engine_is_never_held_up(
    stub: inference_pb2_grpc.InferenceStub, harness: Harness
) -> None:
    num_tokens = 20_000
    wrote_s = []

    def fast(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        began_s = time.monotonic()
        for number in range(num_tokens):
            sink(tokens(0, "x" * 100, number % 300))
        wrote_s.append(time.monotonic() - began_s)
        sink(finished(request, num_tokens))

    harness.engine.behave = fast
    call = stub.Generate(generate())
    next(call)
    time.sleep(0.5)
    chunks = [event.tokens for event in call if event.HasField("tokens")]
    assert [i for chunk in chunks for i in chunk.token_ids] == [number % 300 for number in range(num_tokens)]
    assert len(chunks) < num_tokens / 10
    assert wrote_s[0] < 5


def test_a_client_that_reads_nothing_is_given_up(harness: Harness) -> None:
    harness.config = replace(harness.config, reader_timeout_s=0.3)
    ended = threading.Event()

    def flood(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        while not cancelled.wait(0.001):
            sink(tokens(0, "x" * 10_000, 1))
        ended.set()

    harness.engine.behave = flood
    with harness.serve() as service, grpc.insecure_channel(service.address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate())
        next(call)
        assert ended.wait(20), "the engine still works for it"
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_client_that_takes_not_even_the_first_event_is_told_so(harness: Harness) -> None:
    """gRPC sends no status after a first write that was given up, which carries the headers too."""
    harness.config = replace(harness.config, reader_timeout_s=0.3)
    harness.engine.behave = until_cancelled
    no_window = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
    with harness.serve() as service, grpc.insecure_channel(service.address, options=no_window) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(generate(), timeout=10)
        harness.engine.wait_for_cancel()
        time.sleep(0.3)
        with pytest.raises(grpc.RpcError, match="read it as it comes") as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_waiting_loads_and_unloads_delay_nobody_and_end_with_their_calls(
    channel: grpc.Channel, harness: Harness
) -> None:
    adapters = adapters_pb2_grpc.AdaptersStub(channel)
    harness.store.has_room = False
    load, unload = adapters_pb2.LoadAdapterRequest(name="french"), adapters_pb2.UnloadAdapterRequest(name="french")
    late = [method.future(ask, timeout=1.0) for method, ask in ((adapters.Load, load), (adapters.Unload, unload))]
    waiting = [adapters.Load.future(load, timeout=30) for _ in range(40)]
    began_s = time.monotonic()
    assert len(adapters.List(adapters_pb2.ListAdaptersRequest(), timeout=10).adapters) == 1
    assert adapters.Pin(adapters_pb2.PinAdapterRequest(name="french", pinned=True), timeout=10).pinned
    assert time.monotonic() - began_s < 5
    for call in late:
        assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED
    harness.store.has_room = True
    assert all(call.result().device_bytes == 4000 for call in waiting)
    harness.store.has_room = False
    given_up = adapters.Load.future(load)
    wait_until(lambda: harness.store.num_attempts > 60)
    given_up.cancel()
    time.sleep(0.3)
    before = harness.store.num_attempts
    time.sleep(0.3)
    assert harness.store.num_attempts == before, "a cancelled load is still waiting"


@pytest.mark.parametrize(
    ("method", "code"),
    [("Load", grpc.StatusCode.RESOURCE_EXHAUSTED), ("Unload", grpc.StatusCode.FAILED_PRECONDITION)],
)
def test_waiting_for_an_adapter_has_an_end(
    channel: grpc.Channel, harness: Harness, monkeypatch: pytest.MonkeyPatch, method: str, code: grpc.StatusCode
) -> None:
    monkeypatch.setattr(adapters_service, "_MAX_WAIT_S", 0.2)
    harness.store.has_room = False
    ask = getattr(adapters_pb2, f"{method}AdapterRequest")(name="french")
    with pytest.raises(grpc.RpcError, match=r"after 0\.2 s") as caught:
        getattr(adapters_pb2_grpc.AdaptersStub(channel), method)(ask, timeout=20)
    assert caught.value.code() == code


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)
