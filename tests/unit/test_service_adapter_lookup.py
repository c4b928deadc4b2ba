"""Names are checked before anything is touched; unknown ones cost shared, rate-limited scans."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from service_doubles import FakeInfo, FakeStore

from polyhead_core.errors import AdapterRejected, InvalidRequest, UnknownAdapter
from polyhead_server.service.adapter_lookup import AdapterLookup

EXECUTOR = ThreadPoolExecutor(2)


@pytest.mark.parametrize(
    "name", ["../etc", "a/b", "a\\b", "..", "a\0b", "a\nb", "\x1b[31m", "x" * 256, "\u202egpj", "\u2028"]
)
def test_bad_names_never_reach_the_store(name: str) -> None:
    async def main() -> None:
        store = FakeStore()
        store.known[name] = FakeInfo(name=name)
        for ask in (AdapterLookup(store, EXECUTOR).resolve, AdapterLookup(store, EXECUTOR).ensure_known):
            with pytest.raises(InvalidRequest, match="not usable"):
                await ask(name)
        assert store.num_refreshes == 0

    asyncio.run(main())


def test_no_name_is_the_backbone() -> None:
    async def main() -> None:
        store = FakeStore()
        lookup = AdapterLookup(store, EXECUTOR)
        assert await lookup.resolve("") is None
        version = await lookup.resolve("french")
        assert version is not None
        assert version.content_hash == "ab" * 32
        assert store.num_refreshes == 0

    asyncio.run(main())


def test_an_adapter_put_there_after_the_last_scan_is_found() -> None:
    async def main() -> None:
        store = FakeStore()
        lookup = AdapterLookup(store, EXECUTOR, min_scan_interval_s=0.05)
        for name in ("new", "newer"):
            store.on_disk = {name: FakeInfo(name=name)}
            version = await lookup.resolve(name)
            assert version is not None
            assert version.name == name

    asyncio.run(main())


def test_a_crowd_with_unknown_names_shares_few_scans() -> None:
    async def main() -> None:
        store = FakeStore(refresh_s=0.02)
        lookup = AdapterLookup(store, EXECUTOR, min_scan_interval_s=0.1)
        began_s = time.monotonic()
        results = await asyncio.gather(*(lookup.resolve(f"no{i}") for i in range(200)), return_exceptions=True)
        assert all(isinstance(result, UnknownAdapter) for result in results)
        assert store.num_refreshes <= 2
        for _ in range(3):
            with pytest.raises(UnknownAdapter):
                await lookup.resolve("still-not-there")
        assert store.num_refreshes <= 1 + (time.monotonic() - began_s) / 0.1 + 1

    asyncio.run(main())


def test_a_caller_who_leaves_takes_no_scan_from_those_who_wait_for_it() -> None:
    async def main() -> None:
        store = FakeStore(refresh_s=0.2)
        lookup = AdapterLookup(store, EXECUTOR, min_scan_interval_s=0.0)
        store.on_disk = {"new": FakeInfo(name="new")}
        leaving = asyncio.create_task(lookup.resolve("new"))
        staying = asyncio.create_task(lookup.resolve("new"))
        await asyncio.sleep(0.05)
        leaving.cancel()
        version = await staying
        assert version is not None
        assert version.name == "new"

    asyncio.run(main())


def test_a_refused_adapter_says_so_without_a_scan() -> None:
    async def main() -> None:
        store = FakeStore()
        store.known["broken"] = FakeInfo(name="broken", error="adapter_model.safetensors is truncated")
        lookup = AdapterLookup(store, EXECUTOR)
        with pytest.raises(AdapterRejected, match="truncated"):
            await lookup.resolve("broken")
        await lookup.ensure_known("broken")
        assert store.num_refreshes == 0

    asyncio.run(main())
