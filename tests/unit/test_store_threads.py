"""The adapter store under an engine, its loader and administrators at once: no page mixed up, none leaked."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_making import TinyBackbone
from store_making import CHUNK_BYTES, counts, reseed, take
from store_making import backbone as backbone
from store_making import folder as folder
from store_making import make_store as make_store
from store_making import zoo as zoo

from polyhead_core.errors import AdapterInUse, QueueFull
from polyhead_server.request import AdapterVersion
from polyhead_server.store.store import AdapterStore


@dataclasses.dataclass
class Engine:
    """Takes and gives back adapters at random, as many at once as there is room for, and reads what the tables hold."""

    store: AdapterStore
    versions: list[AdapterVersion]
    first_numbers: dict[str, torch.Tensor]
    site: int
    num_requests: int = 400
    served: Counter[str] = dataclasses.field(default_factory=Counter)
    failed: int = 0

    def run(self) -> None:
        rng = random.Random(1)
        running: list[tuple[AdapterVersion, int]] = []
        waiting: list[AdapterVersion] = []
        deadline_s = time.monotonic() + 60
        while self.served.total() < self.num_requests:
            assert time.monotonic() < deadline_s, f"stuck: {len(self.served)} served, {len(waiting)} waiting"
            self.store.publish()
            if len(waiting) < 12:
                waiting.append(rng.choice(self.versions))
            for version in list(waiting):
                slot = self.store.acquire(version)
                if slot is not None:
                    waiting.remove(version)
                    running.append((version, slot))
                elif self.store.failure(version) is not None:
                    waiting.remove(version)
                    self.failed += 1
            for version, slot in running:
                found = _first_numbers(self.store, slot, self.site)
                assert torch.equal(found, self.first_numbers[version.content_hash]), "another adapter's pages"
            rng.shuffle(running)
            for _ in range(rng.randrange(len(running) + 1)):
                version, _ = running.pop()
                self.store.release(version)
                self.served[version.content_hash] += 1
            self.store.check_integrity()
        for version, _ in running:
            self.store.release(version)


def _disturb(store: AdapterStore, names: list[str], folder: Path, engine: threading.Thread) -> None:
    """What administrators do meanwhile, one folder's replacement included."""
    rng = random.Random(2)
    calls = (store.try_unload, store.get, store.try_load)
    while engine.is_alive():
        with contextlib.suppress(AdapterInUse, QueueFull):
            rng.choice(calls)(rng.choice(names[:-1]))
        if rng.random() < 0.05:
            reseed(folder / names[-1], rng.randrange(1000))
        store.list()
        time.sleep(0.001)


@pytest.mark.parametrize(
    "room", [{"num_slots": 8}, {"num_slots": 64, "pool_bytes": 2 * CHUNK_BYTES}], ids=["8 slots", "8 adapters' bytes"]
)
def test_64_adapters_under_threads_with_room_for_8(
    room: dict[str, int], make_store: Callable[..., AdapterStore], zoo: Path, tmp_path: Path, backbone: TinyBackbone
) -> None:
    folder = tmp_path / "all"
    shutil.copytree(zoo, folder)
    store = make_store(folder=folder, host_cache_bytes=20 * 18_432, scan_interval_s=0.02, **room)
    names = [info.name for info in store.list()]
    assert len(names) == 64
    site = next(site.index for site in backbone.sites if site.path.endswith("q_proj"))
    versions = [store.resolve(name) for name in names]
    first_numbers = {}
    for version in versions:  # what each adapter's first page begins with
        first_numbers[version.content_hash] = _first_numbers(store, take(store, version), site)
        store.release(version)
    engine = Engine(store, versions, first_numbers, site)
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    engine_thread = threading.Thread(target=guarded, args=(engine.run,))
    disturber = threading.Thread(target=guarded, args=(lambda: _disturb(store, names, folder, engine_thread),))
    for thread in (engine_thread, disturber):
        thread.start()
    for thread in (engine_thread, disturber):
        thread.join()
    if errors:
        raise errors[0]
    assert len(engine.served) > 40
    assert counts(store)["evicted"] > 40
    assert store.num_pins == 0
    store.stop()  # whatever is still on its way
    for resident in list(store._cache.residents):
        with store._lock:
            store._cache.give_up(resident.content_hash)
    store.publish()
    store.check_integrity()
    assert store.pool_pages_used == 0
    assert not store.tables.num_pages.any()


def _first_numbers(store: AdapterStore, slot: int, site: int) -> torch.Tensor:
    start = int(store.tables.pages[slot, site, 0, 0]) * 64
    return store.tables.arena[start : start + 16].clone()
