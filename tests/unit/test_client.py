"""Both clients against a real server with doubles behind it: the same answers, the same errors, closable streams."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from service_doubles import FakeInfo, Harness, until_cancelled

import polyhead_client
from polyhead_client import (
    AdapterInUse,
    AdapterRejected,
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    PolyheadClientError,
    PromptTooLong,
    QueueFull,
    ServerError,
    Unavailable,
    UnknownAdapter,
)
from polyhead_core import errors as server_errors
from polyhead_server.config import ServerConfig

Call = Callable[..., Any]


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture
def address(harness: Harness) -> Iterator[str]:
    with harness.serve() as service:
        yield service.address


@pytest.fixture(params=["sync", "asyncio"])
def call(request: pytest.FixtureRequest, address: str) -> Call:
    """call("method", ...) by one client or the other."""

    def by_sync(method: str, *args: Any, **kwargs: Any) -> Any:
        with Client(address) as client:
            return getattr(client, method)(*args, **kwargs)

    def by_asyncio(method: str, *args: Any, **kwargs: Any) -> Any:
        async def main() -> Any:
            async with AsyncClient(address) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    return by_sync if request.param == "sync" else by_asyncio


def test_generate_returns_everything(call: Call) -> None:
    generation = call("generate", "hello", adapter="french", logprobs=1, n=2, temperature=1.0)
    assert generation.text == "Hello there"
    assert generation.token_ids == (0, 1)
    assert [logprob.logprob for logprob in generation.logprobs] == [-0.5, -0.5]
    assert generation.finish_reason == "stop"
    assert generation.adapter.name == "french"
    assert generation.adapter.content_hash == "ab" * 32
    assert generation.usage.completion_tokens == 4
    assert generation.usage.cached_prompt_tokens == 1
    assert [choice.text for choice in generation.choices] == ["Hello there", "Hello there"]
    assert generation.choices[1].stop == "END"
    assert generation.request_id


def test_the_backbone_alone_has_no_adapter(call: Call) -> None:
    assert call("generate", [5, 6, 7]).adapter is None


def test_token_ids_go_as_they_are(call: Call, harness: Harness) -> None:
    call("generate", (5, 6, 7))
    assert harness.engine.submitted[0].prompt_token_ids == (5, 6, 7)


def test_options_that_are_none_are_the_servers_defaults(call: Call, harness: Harness) -> None:
    call("generate", "hello", max_tokens=None, seed=None, stop=None)
    assert harness.engine.submitted[0].params == type(harness.engine.submitted[0].params)()


def test_one_stop_text_may_stand_alone(call: Call, harness: Harness) -> None:
    call("generate", "hello", stop="END")
    assert harness.engine.submitted[0].params.stop == ("END",)


@pytest.mark.parametrize("method", ["generate", "score"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_not_taken_for_token_ids(call: Call, harness: Harness, method: str, kind: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequest, match="expected a str"):
        call(method, kind(b"hello"))
    assert harness.engine.submitted == []


def test_chat_and_score(call: Call) -> None:
    assert call("chat", [{"role": "user", "content": "hi"}], adapter="french").text == "Hello there"
    score = call("score", [5, 6, 7], top_logprobs=2)
    assert score.total_logprob == -2.0
    assert [token.token_id for token in score.tokens] == [5, 6, 7]
    assert score.tokens[1].top[0].logprob == -0.25
    assert call("score", "hello", adapter="french").adapter.name == "french"


def test_adapters(call: Call) -> None:
    (listed,) = call("adapters")
    assert (listed.name, listed.residency, listed.pinned) == ("french", "disk", False)
    loaded = call("load", "french")
    assert (loaded.residency, loaded.device_bytes) == ("device", 4000)
    assert call("pin", "french").pinned
    assert not call("pin", "french", False).pinned
    assert call("unload", "french").residency == "disk"
    assert call("adapter", "french") == call("adapters")[0]


def test_what_is_in_use_is_not_the_requests_fault(
    call: Call, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise server_errors.AdapterInUse(f"adapter {name!r} is pinned", details={"adapter": name})

    monkeypatch.setattr(harness.store, "try_unload", refuse)
    with pytest.raises(AdapterInUse, match="pinned") as caught:
        call("unload", "french")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_info_and_wait_until_ready(call: Call) -> None:
    info = call("info")
    assert info.backbone.architecture == "LlamaForCausalLM"
    assert info.limits.max_model_len == 128
    assert not info.draining
    assert call("wait_until_ready", timeout_s=5) == info


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "error", "says"),
    [
        ("generate", ("hello",), {"adapter": "frnch"}, UnknownAdapter, "near: french"),
        ("generate", ("hello",), {"adapter": "a/b"}, InvalidRequest, "not usable"),
        ("generate", ("hello",), {"adapter": "broken"}, AdapterRejected, "truncated"),
        ("generate", ("0 " * 64,), {}, PromptTooLong, "128"),
        ("generate", ("x" * (10 << 20),), {}, PromptTooLong, "10485760"),
        ("generate", ("hello",), {"top_p": 2.0}, InvalidRequest, "top_p"),
        ("chat", ([],), {}, InvalidRequest, "at least one"),
        ("score", ("",), {}, InvalidRequest, "empty"),
        ("score", ("hello",), {"top_logprobs": 6}, InvalidRequest, "top_logprobs"),
        ("adapter", ("nope",), {}, UnknownAdapter, "nope"),
        ("load", ("../x",), {}, InvalidRequest, "not usable"),
        ("pin", ("",), {}, InvalidRequest, "empty"),
    ],
)
def test_errors_of_the_server(
    call: Call,
    harness: Harness,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: type[PolyheadClientError],
    says: str,
) -> None:
    harness.store.known["broken"] = FakeInfo(name="broken", error="truncated")
    with pytest.raises(error, match=says) as caught:
        call(method, *args, **kwargs)
    assert type(caught.value) is error
    assert caught.value.reason
    assert caught.value.code is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (server_errors.QueueFull("full", details={"limit": 3}, retry_after_s=0.25), QueueFull),
        (server_errors.Draining("draining"), Unavailable),
        (server_errors.EngineFailure("lost"), ServerError),
        (server_errors.RequestCancelled("gone"), Cancelled),
        (server_errors.RequestDeadlineExceeded("late"), DeadlineExceeded),
        (server_errors.AdapterTooLarge("rank"), AdapterRejected),
        (ValueError("a bug"), ServerError),
    ],
)
def test_errors_of_the_engine(
    call: Call, harness: Harness, given: Exception, expected: type[PolyheadClientError]
) -> None:
    harness.engine.refuse_with = given
    with pytest.raises(expected) as caught:
        call("generate", "hello")
    assert type(caught.value) is expected
    if isinstance(given, server_errors.PolyheadError):
        assert caught.value.details == given.details
        assert caught.value.retry_after_s == given.retry_after_s


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "field"),
    [
        ("generate", ("hello",), {"max_tokens": -1}, "max_tokens"),
        ("generate", ("hello",), {"max_tokens": 2**32}, "max_tokens"),
        ("generate", ("hello",), {"max_tokens": 1.5}, "max_tokens"),
        ("generate", ("hello",), {"temperature": "hot"}, "temperature"),
        ("generate", ("hello",), {"seed": -1}, "seed"),
        ("generate", ("hello",), {"stop": [1]}, "stop"),
        ("generate", ("hello",), {"stop_token_ids": 3}, "stop_token_ids"),
        ("generate", ("hello",), {"adapter": 5}, "adapter"),
        ("generate", ("\ud800",), {}, "prompt"),
        ("generate", ([-1],), {}, "prompt"),
        ("generate", (["a"],), {}, "prompt"),
        ("generate", (None,), {}, "prompt"),
        ("chat", ("hello",), {}, "messages"),
        ("chat", ([{"role": "user"}],), {}, "messages"),
        ("chat", ([{"role": "user", "content": None}],), {}, "content"),
        ("score", ("x",), {"top_logprobs": -1}, "top_logprobs"),
        ("adapter", (None,), {}, "name"),
    ],
)
def test_arguments_that_cannot_travel_are_refused_here(
    method: str, args: tuple[Any, ...], kwargs: dict[str, Any], field: str
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=field):
        getattr(client, method)(*args, **kwargs)


def test_unknown_arguments_are_type_errors() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="max_token'"):
        client.generate("hello", max_token=3)  # type: ignore[call-arg]


def test_no_server_is_connection_failed() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ConnectionFailed):
            client.generate("hello")
        with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1 "):
            client.wait_until_ready(timeout_s=0.3)


def test_a_server_that_comes_late_is_seen_at_once() -> None:
    """By default gRPC's attempts lie further apart each time: 1 s, 2.6 s, 5.2 s after the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    late_s, seen_s = 3.2, 1.5
    with Client(address) as client, ThreadPoolExecutor(1) as pool:
        ready = pool.submit(client.wait_until_ready, late_s + seen_s)
        time.sleep(late_s)
        with Harness(config=ServerConfig(listen=address, drain_timeout_s=1.0)).serve():
            ready.result()


def test_timeouts_are_deadline_exceeded(call: Call, harness: Harness) -> None:
    harness.engine.behave = until_cancelled
    with pytest.raises(DeadlineExceeded):
        call("generate", "hello", timeout_s=0.3)
    harness.engine.wait_for_cancel()


def test_a_stream_yields_chunks_and_then_the_whole(address: str) -> None:
    with Client(address) as client, client.stream("hello", adapter="french") as stream:
        texts = [chunk.text for chunk in stream]
        assert "".join(texts) == "Hello there"
        assert stream.adapter is not None
        assert stream.adapter.name == "french"
        assert stream.result().text == "Hello there"
        assert stream.result().request_id == stream.request_id


def test_closing_a_stream_cancels_it(address: str, harness: Harness) -> None:
    harness.engine.behave = until_cancelled
    with Client(address) as client:
        stream = client.stream("hello")
        assert next(iter(stream)).text == "first"
        stream.close()
        with pytest.raises(Cancelled):
            stream.result()
        harness.engine.wait_for_cancel()


def test_an_async_stream_yields_chunks_and_then_the_whole(address: str) -> None:
    async def main() -> None:
        async with AsyncClient(address) as client, client.chat_stream([{"role": "user", "content": "hi"}]) as stream:
            assert "".join([chunk.text async for chunk in stream]) == "Hello there"
            assert (await stream.result()).text == "Hello there"

    asyncio.run(main())


def test_closing_an_async_stream_cancels_it(address: str, harness: Harness) -> None:
    harness.engine.behave = until_cancelled

    async def main() -> None:
        async with AsyncClient(address) as client:
            stream = client.stream("hello")
            async for chunk in stream:
                assert chunk.text == "first"
                break
            await stream.close()
            with pytest.raises(Cancelled):
                await stream.result()

    asyncio.run(main())
    harness.engine.wait_for_cancel()


@pytest.mark.parametrize("method", ["generate", "score", "stream"])
def test_closing_the_client_is_told_to_those_who_wait(address: str, harness: Harness, method: str) -> None:
    harness.engine.behave = until_cancelled

    async def main() -> None:
        client = AsyncClient(address)
        call = client.stream("hello").result() if method == "stream" else getattr(client, method)("hello")
        task = asyncio.create_task(call)
        while not harness.engine.submitted:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(Cancelled):
            await task

    asyncio.run(main())


def test_a_task_that_is_cancelled_when_the_client_closes_is_cancelled(address: str, harness: Harness) -> None:
    harness.engine.behave = until_cancelled

    async def main() -> None:
        client = AsyncClient(address)
        task = asyncio.create_task(client.generate("hello"))
        while not harness.engine.submitted:
            await asyncio.sleep(0.01)
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_cancelling_the_task_cancels_the_call(address: str, harness: Harness) -> None:
    harness.engine.behave = until_cancelled

    async def main() -> None:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.generate("hello"))
            while not harness.engine.submitted:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    harness.engine.wait_for_cancel()


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert surface(Client) == surface(AsyncClient)
    assert all(hasattr(polyhead_client, name) for name in polyhead_client.__all__)


def test_many_async_calls_share_one_client(address: str) -> None:
    async def main() -> list[Any]:
        async with AsyncClient(address) as client:
            calls: list[Awaitable[Any]] = [client.generate("hello", adapter="french") for _ in range(50)]
            return await asyncio.gather(*calls)

    assert {generation.text for generation in asyncio.run(main())} == {"Hello there"}
