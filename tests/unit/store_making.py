"""A store over a folder of small adapters, and calls that wait for it as an engine does.

Tests import the fixtures `as` themselves, which ruff takes for a use.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_making import TinyBackbone, edit_adapter, llama, make_adapter

from polyhead_server.request import AdapterVersion
from polyhead_server.store.backbone_view import view_backbone
from polyhead_server.store.page_allocator import CHUNK_UNITS
from polyhead_server.store.store import AdapterInfo, AdapterStore

CHUNK_BYTES = CHUNK_UNITS * 64 * 4


class Counters:
    """Counts what the store reports."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.pool = (0, 0)

    def adapter_loaded(self, seconds: float) -> None:
        assert seconds >= 0
        self.counts["loaded"] += 1

    def adapter_load_failed(self) -> None:
        self.counts["failed"] += 1

    def adapter_evicted(self) -> None:
        self.counts["evicted"] += 1

    def adapter_pool(self, used_pages: int, total_pages: int) -> None:
        self.pool = (used_pages, total_pages)


@pytest.fixture(scope="module")
def backbone() -> TinyBackbone:
    return TinyBackbone(llama(layers=1))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 adapters of mixed ranks, by one peft model each for the few shapes and edited numbers for the rest."""
    folder = tmp_path_factory.mktemp("zoo")
    for index in range(64):
        directory = folder / f"adapter-{index:02d}"
        if index < 4:
            rank = (2, 8, 13, 16)[index]
            make_adapter(directory, llama(layers=1), seed=index, r=rank, target_modules=["q_proj", "up_proj"])
        else:
            shutil.copytree(folder / f"adapter-{index % 4:02d}", directory)
            reseed(directory, index)
    return folder


def reseed(directory: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def edit(_: object, tensors: dict[str, torch.Tensor], __: object) -> None:
        for key in sorted(tensors):
            tensors[key].normal_(std=0.3, generator=generator)

    edit_adapter(directory, edit)


@pytest.fixture
def folder(zoo: Path, tmp_path: Path) -> Path:
    """A folder of its own with eight of them."""
    for index in range(8):
        shutil.copytree(zoo / f"adapter-{index:02d}", tmp_path / "adapters" / f"adapter-{index:02d}")
    return tmp_path / "adapters"


@pytest.fixture
def make_store(backbone: TinyBackbone, folder: Path) -> Iterator[Callable[..., AdapterStore]]:
    stores: list[AdapterStore] = []

    def make(**settings: Any) -> AdapterStore:
        defaults: dict[str, Any] = {"folder": folder, "metrics": Counters(), "num_slots": 4, "scan_interval_s": 60.0}
        store = AdapterStore(view_backbone(backbone), **{**defaults, "pool_bytes": 8 << 20, **settings})
        stores.append(store)
        store.start()
        return store

    yield make
    for store in stores:
        store.check_integrity()
        store.stop()


def take(store: AdapterStore, version: AdapterVersion, timeout_s: float = 5.0) -> int:
    """Acquires as an engine does that steps all the time."""
    deadline_s = time.monotonic() + timeout_s
    while (slot := store.acquire(version)) is None:
        error = store.failure(version)
        if error is not None:
            raise error
        assert time.monotonic() < deadline_s, "no slot in time"
        time.sleep(0.002)
        store.publish()
    return slot


def load(store: AdapterStore, name: str) -> AdapterInfo:
    return until_done(lambda: store.try_load(name))


def unload(store: AdapterStore, name: str) -> AdapterInfo:
    return until_done(lambda: store.try_unload(name))


def until_done(attempt: Callable[[], AdapterInfo | None]) -> AdapterInfo:
    deadline_s = time.monotonic() + 10
    while (info := attempt()) is None:
        assert time.monotonic() < deadline_s, "not done in time"
        time.sleep(0.002)
    return info


def counts(store: AdapterStore) -> Counter[str]:
    metrics = store._metrics
    assert isinstance(metrics, Counters)
    return metrics.counts
