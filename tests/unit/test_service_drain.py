"""Shutting down: running requests finish, new ones are turned away, and signals do it in a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_doubles import Harness, finished, tokens, until_cancelled

from polyhead_client import Cancelled, Client, ServerError, Unavailable
from polyhead_server.request import EventSink, Request


def test_running_requests_finish_and_new_ones_are_unavailable() -> None:
    harness = Harness()
    release = threading.Event()

    def slow(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        sink(tokens(0, "first", 1))
        release.wait(10)
        sink(tokens(0, " last", 2))
        sink(finished(request, 2))

    harness.engine.behave = slow
    with harness.serve() as service, Client(service.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("hello")
        chunks = iter(stream)
        next(chunks)
        draining = pool.submit(service.drain)
        while not harness.engine.current.draining:
            time.sleep(0.01)
        with pytest.raises(Unavailable, match="shutting down") as caught:
            client.generate("hello")
        assert caught.value.reason == "DRAINING"
        assert caught.value.retry_after_s == 1.0
        assert client.info().draining
        with grpc.insecure_channel(service.address) as channel:
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        release.set()
        assert stream.result().text == "first last"
        assert draining.result(5)


def test_after_the_timeout_the_rest_is_failed_not_dropped() -> None:
    harness = Harness()
    harness.engine.behave = until_cancelled
    with harness.serve() as service, Client(service.address) as client:
        stream = client.stream("hello")
        chunks = iter(stream)
        next(chunks)
        began_s = time.monotonic()
        assert not service.drain(0.3)
        assert time.monotonic() - began_s < 5
        with pytest.raises((Cancelled, Unavailable, ServerError)):
            stream.result()


_PROCESS = """
import asyncio, sys
from dataclasses import replace
from service_doubles import Harness, until_cancelled, finished, tokens
from polyhead_server.cli import run_until_signal
from polyhead_server.service.server import Service
harness = Harness()
harness.config = replace(harness.config, drain_timeout_s=30.0)
def slow(request, sink, cancelled):
    sink(tokens(0, "first", 1))
    cancelled.wait(float(request.prompt_token_ids[0]))
    sink(finished(request, 1))
harness.engine.behave = slow
asyncio.run(run_until_signal(Service(*harness.parts()), harness.config, "backbone test"))
"""


def start_process() -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROCESS], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "backbone test\n"
    line = process.stdout.readline()
    assert line.startswith("listening on 127.0.0.1:")
    return process, line.split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_drains_and_exits_with_0(number: signal.Signals) -> None:
    process, address = start_process()
    with Client(address) as client:
        stream = client.stream([1])
        next(iter(stream))
        process.send_signal(number)
        assert stream.result().text == "first"
    assert process.wait(10) == 0


def test_a_second_signal_stops_at_once_with_0() -> None:
    process, address = start_process()
    with Client(address) as client:
        stream = client.stream([25])
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        with pytest.raises((Cancelled, Unavailable)):
            stream.result()
