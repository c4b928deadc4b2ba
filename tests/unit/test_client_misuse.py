"""Both clients where gRPC alone would fail: timeouts that are no times, after they were closed, beside a proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import pytest
from service_doubles import Harness

from polyhead_client import AsyncClient, Cancelled, Client, InvalidRequest, PolyheadClientError, Unavailable, wire
from polyhead_client.errors import from_rpc_error


@pytest.fixture
def address() -> Iterator[str]:
    with Harness().serve() as service:
        yield service.address


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e300, 1e10, 1e9])
def test_a_timeout_beyond_all_times_is_none(address: str, timeout_s: float) -> None:
    """gRPC's clocks overflow, and such calls ended at once with DeadlineExceeded."""
    with Client(address) as client:
        assert client.generate("hello", timeout_s=timeout_s).text == "Hello there"
        assert client.chat([{"role": "user", "content": "hello"}], timeout_s=timeout_s).text == "Hello there"
        assert client.score("the user", timeout_s=timeout_s).tokens
        assert client.adapters(timeout_s=timeout_s)
        for ask in (client.adapter, client.load, client.pin, client.unload):
            if ask == client.unload:
                client.pin("french", False)
            assert ask("french", timeout_s=timeout_s).name == "french"
        assert not client.wait_until_ready(timeout_s).draining

    async def main() -> None:
        async with AsyncClient(address) as client:
            assert (await client.generate("hello", timeout_s=timeout_s)).text == "Hello there"
            assert not (await client.wait_until_ready(timeout_s)).draining

    asyncio.run(main())


def test_a_timeout_that_is_no_number_is_refused(address: str) -> None:
    with Client(address) as client, pytest.raises(InvalidRequest, match="timeout_s"):
        client.generate("hello", timeout_s=float("nan"))


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    for call in (client.info, client.adapters, lambda: client.generate("hello"), lambda: client.score("hello")):
        with pytest.raises(Cancelled, match="closed"):
            call()
    client.close()

    async def main() -> None:
        client = AsyncClient(address)
        await client.close()
        for call in (client.info, client.adapters, lambda: client.generate("hello"), lambda: client.score("hello")):
            with pytest.raises(Cancelled, match="closed"):
                await call()
        with pytest.raises(Cancelled, match="closed"):
            client.stream("hello")
        await client.close()

    asyncio.run(main())


def test_an_http_proxy_does_not_stand_before_ones_own_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port = address.rpartition(":")[2]
    for target in (address, f"localhost:{port}", f"ipv4:{address}"):
        with Client(target) as client:
            assert not client.info(timeout_s=20).draining

    async def main() -> None:
        async with AsyncClient(address) as client:
            assert not (await client.info(timeout_s=20)).draining

    asyncio.run(main())


@pytest.mark.parametrize("target", ["gpu-box:50051", "127.example.org:1", "localhost.example.org:1", "10.0.0.1:50051"])
def test_other_machines_are_asked_as_the_environment_says(target: str) -> None:
    assert wire.channel_options(target) == wire.CHANNEL_OPTIONS


@pytest.mark.parametrize(
    ("details", "kind"),
    [("CANCELLED", Unavailable), ("", Unavailable), ("Locally cancelled by application!", Cancelled)],
)
def test_a_call_that_the_server_gave_up_unseen_is_not_taken_for_ones_own_cancelling(
    details: str, kind: type[PolyheadClientError]
) -> None:
    call = SimpleNamespace(
        code=lambda: grpc.StatusCode.CANCELLED, details=lambda: details, trailing_metadata=lambda: None
    )
    assert type(from_rpc_error(call)) is kind
