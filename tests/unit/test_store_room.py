"""The adapter store when slots or bytes run out: eviction, pins, and who gets the room."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_making import llama, make_adapter
from store_making import CHUNK_BYTES, counts, load, take, unload, until_done
from store_making import backbone as backbone
from store_making import folder as folder
from store_making import make_store as make_store
from store_making import zoo as zoo

from polyhead_core.errors import AdapterInUse, AdapterTooLarge, QueueFull
from polyhead_server.request import AdapterVersion
from polyhead_server.store import load_book, residency
from polyhead_server.store.residency import Residency
from polyhead_server.store.store import AdapterStore


def test_more_adapters_than_slots(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(num_slots=2)
    versions = [store.resolve(f"adapter-{index:02d}") for index in range(8)]
    for version in versions * 2:
        take(store, version)
        store.check_integrity()
        store.release(version)
    assert counts(store)["loaded"] == 16
    assert counts(store)["evicted"] == 14
    on_device = [info.name for info in store.list() if info.residency is Residency.DEVICE]
    assert on_device == ["adapter-06", "adapter-07"], "the least recently used went"


def test_no_load_while_all_is_pinned(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(num_slots=2)
    first, second, third = (store.resolve(f"adapter-{index:02d}") for index in range(3))
    take(store, first)
    take(store, second)
    with pytest.raises(AssertionError, match="no slot in time"):
        take(store, third, timeout_s=0.4)
    assert store.failure(third) is None, "that there is no room now is no failure"
    assert counts(store)["evicted"] == 0
    store.release(first)
    take(store, third)
    assert store.get("adapter-00").residency is Residency.HOST


def test_room_by_bytes(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(pool_bytes=2 * CHUNK_BYTES, num_slots=8)
    take(store, store.resolve("adapter-03"))
    assert store.pool_bytes == 2 * CHUNK_BYTES
    assert store.pool_used_bytes == store.get("adapter-03").device_bytes == 4 * 16 * (64 + 64 + 64 + 96)
    assert store._metrics.pool == (store.pool_pages_used, store.pool_pages)  # type: ignore[attr-defined]
    for index in (*range(3), *range(4, 8)):
        version = store.resolve(f"adapter-{index:02d}")
        take(store, version)
        store.check_integrity()
        store.release(version)
    assert counts(store)["evicted"] > 0
    assert store.get("adapter-03").residency is Residency.DEVICE


def test_an_adapter_that_never_fits_is_refused_with_both_numbers(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(pool_bytes=CHUNK_BYTES)
    with pytest.raises(AdapterTooLarge) as caught:
        store.resolve("adapter-03")
    assert caught.value.details["pool_bytes"] == str(CHUNK_BYTES)
    assert caught.value.details["bytes"] in caught.value.message


def test_load_of_more_than_fits_without_an_engine(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(num_slots=2)
    for index in range(8):
        assert load(store, f"adapter-{index:02d}").residency is Residency.DEVICE
        store.check_integrity()


def test_pins_of_users(make_store: Callable[..., AdapterStore], folder: Path, zoo: Path) -> None:
    store = make_store(num_slots=2)
    assert store.pin("adapter-00", True).pinned
    load(store, "adapter-00")
    for index in range(1, 8):
        load(store, f"adapter-{index:02d}")
    assert store.get("adapter-00").residency is Residency.DEVICE
    with pytest.raises(AdapterInUse, match="is pinned"):
        unload(store, "adapter-00")
    store.pin("adapter-07", True)
    with pytest.raises(QueueFull, match="unpin"):
        load(store, "adapter-01")
    with pytest.raises(QueueFull, match="unpin"):
        take(store, store.resolve("adapter-02"))
    assert not store.pin("adapter-07", False).pinned
    take(store, store.resolve("adapter-02"))  # at once: what it was refused for holds no more
    shutil.rmtree(folder / "adapter-00")
    shutil.copytree(zoo / "adapter-12", folder / "adapter-00")
    store.refresh()
    assert load(store, "adapter-00").pinned, "the pin is the name's, whatever it means"
    shutil.rmtree(folder / "adapter-00")
    store.refresh()
    shutil.copytree(zoo / "adapter-12", folder / "adapter-00")
    store.refresh()
    assert not store.get("adapter-00").pinned, "a pin ends with its folder"


def test_one_that_users_pins_bar_is_refused_though_another_idles(
    make_store: Callable[..., AdapterStore], folder: Path
) -> None:
    for seed, name in enumerate(("large", "other")):
        make_adapter(
            folder / name, llama(layers=1), seed=seed, r=128, target_modules=["q_proj", "up_proj", "down_proj"]
        )
    size = load(make_store(), "large").device_bytes
    store = make_store(pool_bytes=(size // CHUNK_BYTES + 3) * CHUNK_BYTES)
    store.pin("large", True)
    load(store, "large")
    load(store, "adapter-00")
    with pytest.raises(QueueFull, match="unpin"):
        take(store, store.resolve("other"))
    store.pin("large", False)
    take(store, store.resolve("other"))


def test_a_pin_is_honoured_once_there_is_room(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(num_slots=1)
    used = store.resolve("adapter-00")
    take(store, used)
    store.pin("adapter-01", True)
    time.sleep(2 * load_book.ROOM_RETRY_S)
    assert store.get("adapter-01").residency is not Residency.DEVICE
    store.release(used)
    until_done(lambda: one if (one := store.get("adapter-01")).residency is Residency.DEVICE else None)


def test_whether_room_or_only_time_is_lacking(
    make_store: Callable[..., AdapterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(num_slots=1, host_cache_bytes=0)
    used, wanted = store.resolve("adapter-00"), store.resolve("adapter-01")
    read, reading = store._loader._read, threading.Event()
    monkeypatch.setattr(store._loader, "_read", lambda path: (reading.wait(5), read(path))[1])
    assert store.acquire(used) is None
    assert not store.lacks_room(used), "it is being read"
    reading.set()
    take(store, used)
    deadline_s = time.monotonic() + 5
    while not store.lacks_room(wanted):
        assert time.monotonic() < deadline_s
        assert store.acquire(wanted) is None
        time.sleep(0.001)
    began_s = time.monotonic()
    while time.monotonic() < began_s + 3 * load_book.ROOM_RETRY_S:
        assert store.acquire(wanted) is None
        assert store.lacks_room(wanted), "while it is tried again as well"
    store.release(used)
    take(store, wanted)
    assert not store.lacks_room(wanted)


def test_two_that_want_the_same_room_both_get_their_turn(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store(num_slots=1)
    versions = [store.resolve(f"adapter-{index:02d}") for index in range(2)]
    waiting = [versions[0], versions[1]] * 10
    turns: list[AdapterVersion] = []
    deadline_s = time.monotonic() + 20
    while waiting:
        assert time.monotonic() < deadline_s, f"only {len(turns)} turns"
        store.publish()
        for version in list(waiting):
            if store.acquire(version) is not None:
                turns.append(version)
                waiting.remove(version)
                store.release(version)
                break
        time.sleep(0.001)
    assert Counter(turns) == {versions[0]: 10, versions[1]: 10}


def test_an_idle_engine_is_woken_when_room_comes_free_by_time(
    make_store: Callable[..., AdapterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "PROTECTION_S", 0.3)
    store = make_store(num_slots=1)
    woken = threading.Event()
    store.set_wakeup(woken.set)
    abandoned, wanted = store.resolve("adapter-00"), store.resolve("adapter-01")
    assert store.acquire(abandoned) is None
    assert woken.wait(5)
    store.publish()  # and whoever waited for it has gone
    slot, wakeups = None, 0
    while slot is None:
        woken.clear()
        slot = store.acquire(wanted)
        assert slot is not None or woken.wait(5), "nobody will ever ask again"
        store.publish()
        wakeups += 1
    assert wakeups < 20
