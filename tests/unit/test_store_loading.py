"""The adapter store: from a name to the tables that serve it, unloading, a loader that fails, and settings."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_making import TinyBackbone, llama, logits, make_adapter, served_by_tables
from store_making import Counters, counts, load, take, unload
from store_making import backbone as backbone
from store_making import folder as folder
from store_making import make_store as make_store
from store_making import zoo as zoo

from polyhead_core.errors import AdapterInUse, ConfigError, PolyheadError
from polyhead_server.config import ServerConfig
from polyhead_server.store.residency import Residency
from polyhead_server.store.store import AdapterStore


def test_from_name_to_logits(make_store: Callable[..., AdapterStore], backbone: TinyBackbone, folder: Path) -> None:
    store = make_store()
    expected = {}
    for index in range(3):
        rank = (2, 8, 13)[index]
        settings = {"seed": index, "r": rank, "target_modules": ["q_proj", "up_proj"]}
        expected[index] = logits(make_adapter(folder.parent / "again", llama(layers=1), **settings))
    slots = [take(store, store.resolve(f"adapter-{index:02d}")) for index in range(3)]
    assert len(set(slots)) == 3
    for index, slot in enumerate(slots):
        with served_by_tables(backbone, store.tables, slot):
            torch.testing.assert_close(logits(backbone.model), expected[index], atol=1e-5, rtol=1e-4)


def test_a_load_becomes_visible_only_at_a_step_boundary(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store()
    woken = threading.Event()
    store.set_wakeup(woken.set)
    version = store.resolve("adapter-00")
    assert store.get("adapter-00").residency is Residency.HOST, "the scan has read it"
    before = [store.tables.num_pages.clone(), store.tables.pages.clone()]
    assert store.acquire(version) is None
    assert woken.wait(5)
    assert store.get("adapter-00").residency is Residency.DEVICE
    assert store.acquire(version) is None
    assert torch.equal(store.tables.num_pages, before[0])
    assert torch.equal(store.tables.pages, before[1])
    store.publish()
    slot = store.acquire(version)
    assert slot is not None
    assert store.tables.num_pages[slot].any()
    assert store.get("adapter-00").active_requests == store.num_pins == 1
    store.release(version)
    assert store.num_pins == 0


def test_equal_contents_share_one_residency(make_store: Callable[..., AdapterStore], folder: Path) -> None:
    shutil.copytree(folder / "adapter-01", folder / "twin")
    store = make_store()
    one, other = store.resolve("adapter-01"), store.resolve("twin")
    assert one.content_hash == other.content_hash
    assert take(store, one) == store.acquire(other)
    assert counts(store)["loaded"] == 1
    assert store.get("twin").active_requests == 2


def test_load_and_unload(make_store: Callable[..., AdapterStore]) -> None:
    store = make_store()
    info = load(store, "adapter-02")
    assert info.residency is Residency.DEVICE
    assert info.device_bytes > 0
    assert info.max_rank == 13
    assert (info.peft_type, info.error, info.pinned, info.active_requests) == ("LORA", "", False, 0)
    version = store.resolve("adapter-02")
    slot = take(store, version)
    with pytest.raises(AdapterInUse, match="in use by 1 request"):
        unload(store, "adapter-02")
    store.release(version)
    info = unload(store, "adapter-02")
    assert (info.residency, info.device_bytes) == (Residency.DISK, 0)
    assert store.pool_pages_used == 0
    store.publish()
    assert not store.tables.num_pages[slot].any(), "nothing of it stays in the tables"
    take(store, version)


def test_a_loader_that_meets_our_bug_fails_the_request_and_goes_on(
    make_store: Callable[..., AdapterStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    version = store.resolve("adapter-00")
    with monkeypatch.context() as patch:
        patch.setattr(store._pool, "write", lambda packed, starts: 1 / 0)
        with pytest.raises(PolyheadError, match="division by zero"):
            take(store, version)
    assert store.pool_pages_used == 0
    store.check_integrity()
    take(store, store.resolve("adapter-01"))


def test_for_backbone_takes_the_settings(backbone: TinyBackbone, folder: Path) -> None:
    config = ServerConfig(
        adapters=str(folder), adapter_pool_bytes=1 << 20, max_resident_adapters=3, max_adapter_rank=20
    )
    exact = AdapterStore.for_backbone(config, backbone, Counters())
    assert exact.tables.arena.dtype == torch.float32
    assert exact.tables.pages.shape == (3, len(backbone.sites), 3, 2)
    assert exact.pool_bytes == 1 << 20
    int8 = dataclasses.replace(backbone, quantization="int8")
    assert AdapterStore.for_backbone(config, int8, Counters()).tables.arena.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="existing folder"):
        AdapterStore.for_backbone(ServerConfig(adapters=str(folder / "nowhere")), backbone, Counters())
    nothing = AdapterStore.for_backbone(ServerConfig(adapter_pool_bytes=1 << 20), backbone, Counters())
    nothing.refresh()
    assert list(nothing.list()) == []


def test_a_folder_that_cannot_be_read_is_refused_at_the_start(
    backbone: TinyBackbone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root every folder can be
    with pytest.raises(ConfigError, match="can be read"):
        AdapterStore.for_backbone(ServerConfig(adapters=str(folder)), backbone, Counters())


@pytest.mark.parametrize("interval_s", [float("inf"), 1e12])
def test_a_scan_interval_beyond_all_times_means_no_scan(
    make_store: Callable[..., AdapterStore], interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    store = make_store(scan_interval_s=interval_s)
    store.stop()
    assert not died
