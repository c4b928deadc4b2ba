"""The server as an operator meets it: signals, exit codes, health, reflection, queues, deadlines, wrong settings."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from polyhead_client import Client, DeadlineExceeded, Generation, PolyheadClientError, QueueFull, Unavailable
from running_server import RunningServer
from tiny import save_backbone

LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("process")
    return {"backbone": save_backbone("llama", root / "backbone"), "cache": root / "cache"}


class Caller:
    """One long request in a thread of its own."""

    def __init__(self, address: str) -> None:
        self.result: Generation | PolyheadClientError | None = None
        self.started = threading.Event()
        self._client = Client(address)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.started.wait(20)

    def _run(self) -> None:
        stream = self._client.stream("something long", **LONG)
        try:
            for _ in stream:
                self.started.set()
            self.result = stream.result()
        except PolyheadClientError as error:
            self.result = error

    def join(self) -> Generation | PolyheadClientError | None:
        self._thread.join(60)
        self._client.close()
        return self.result


def test_sigterm_lets_the_running_finish_and_refuses_the_new(folders: dict[str, Path], tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log", **folders) as server, Client(server.address) as client:
        caller = Caller(server.address)
        server.process.send_signal(signal.SIGTERM)
        refused: PolyheadClientError | None = None
        while refused is None:
            try:
                client.generate("x", max_tokens=1)
            except Unavailable as error:
                refused = error
        finished = caller.join()
        assert isinstance(finished, Generation), finished
        assert finished.usage.completion_tokens == 400
        assert server.process.wait(30) == 0


def test_what_outlasts_the_drain_timeout_fails_with_a_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    with RunningServer(tmp_path / "log", **folders, drain_timeout_s=0.05) as server:
        caller = Caller(server.address)
        server.process.send_signal(signal.SIGTERM)
        failed = caller.join()
        assert isinstance(failed, Unavailable), failed
        assert "shut down" in failed.message
        assert server.process.wait(30) == 0


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = {"max_queued_requests": 2, "max_batch_rows": 2}
    with RunningServer(tmp_path_factory.mktemp("log") / "log", **folders, **settings) as server:
        yield server


def test_health_and_reflection_answer(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "polyhead.v1.Inference"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"polyhead.v1.Inference", "polyhead.v1.Adapters", "polyhead.v1.Server", "grpc.health.v1.Health"} <= set(
        services
    )


def test_a_full_queue_says_when_to_come_back(server: RunningServer) -> None:
    with Client(server.address) as client:
        streams = [client.stream("fill", **LONG) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        waiting = [client.stream("wait", **LONG) for _ in range(2)]
        server.wait_until(lambda metrics: metrics["polyhead_requests_waiting"] == 2)
        with pytest.raises(QueueFull) as caught:
            client.generate("one too many", max_tokens=1)
        assert caught.value.retry_after_s
        for stream in (*streams, *waiting):
            stream.close()
    server.wait_until_idle()


def test_a_deadline_frees_everything(server: RunningServer) -> None:
    with Client(server.address) as client:
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("too slow", timeout_s=0.2, **LONG)
        assert time.monotonic() - started_s < 10
        server.wait_until_idle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_batch_row=3"], "max_batch_rows"),
        (["--set", "kv_block_size=none"], "kv_block_size"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--backbone", "/no/such/folder"], "backbone"),
        (["--config", "/no/such/file.toml"], "file.toml"),
    ],
)
def test_wrong_settings_give_one_clear_line_and_code_2(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "polyhead_server.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
