"""The adapter store as the engine and the service use it: tiers, eviction, replaced folders, failures, and stress."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_making import TinyBackbone, edit_adapter, llama, logits, make_adapter, served_by_tables

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from polyhead_core.errors import (
    AdapterFormatError,
    AdapterInUse,
    AdapterRejected,
    AdapterTooLarge,
    ConfigError,
    InvalidRequest,
    PolyheadError,
    QueueFull,
    UnknownAdapter,
)
from polyhead_server.config import ServerConfig
from polyhead_server.request import AdapterVersion
from polyhead_server.store import load_book, residency
from polyhead_server.store.backbone_view import view_backbone
from polyhead_server.store.page_allocator import CHUNK_UNITS
from polyhead_server.store.residency import Residency
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
            _reseed(directory, index)
    return folder


def _reseed(directory: Path, seed: int) -> None:
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


def test_equal_contents_share_one_residency(make_store: Callable[..., AdapterStore], folder: Path) -> None:
    shutil.copytree(folder / "adapter-01", folder / "twin")
    store = make_store()
    one, other = store.resolve("adapter-01"), store.resolve("twin")
    assert one.content_hash == other.content_hash
    assert take(store, one) == store.acquire(other)
    assert counts(store)["loaded"] == 1
    assert store.get("twin").active_requests == 2


def test_unknown_names_and_refused_folders(make_store: Callable[..., AdapterStore], folder: Path) -> None:
    (folder / "adapter-05" / WEIGHTS_FILE).write_bytes(b"\x80\x04garbage")
    store = make_store()
    with pytest.raises(UnknownAdapter, match="adapter-00") as unknown:
        store.resolve("adaptor-00")
    assert unknown.value.details == {"adapter": "adaptor-00"}
    for name in ("../adapter-00", "a/b", "", ".", "\0", "x" * 999):
        with pytest.raises(InvalidRequest):
            store.resolve(name)
    with pytest.raises(AdapterFormatError, match="pickle"):
        store.resolve("adapter-05")
    for call in (store.try_load, store.try_unload, lambda name: store.pin(name, True)):
        with pytest.raises(AdapterFormatError, match="pickle"):
            call("adapter-05")
        with pytest.raises(UnknownAdapter):
            call("nobody")
    info = store.get("adapter-05")
    assert "pickle" in info.error
    assert not store.pin("adapter-05", False).pinned
    assert (info.content_hash, info.residency) == ("", Residency.DISK)
    assert [info.name for info in store.list() if info.error] == ["adapter-05"]


def test_a_folder_replaced_while_in_use(
    make_store: Callable[..., AdapterStore], backbone: TinyBackbone, folder: Path, zoo: Path
) -> None:
    store = make_store()
    old = store.resolve("adapter-00")
    slot = take(store, old)
    with served_by_tables(backbone, store.tables, slot):
        before = logits(backbone.model)
    shutil.rmtree(folder / "adapter-00")
    shutil.copytree(zoo / "adapter-09", folder / "adapter-00")
    store.refresh()
    new = store.resolve("adapter-00")
    assert new.content_hash != old.content_hash
    new_slot = take(store, new)
    for index in range(1, 5):
        other = store.resolve(f"adapter-{index:02d}")
        take(store, other)
        store.release(other)
    with served_by_tables(backbone, store.tables, slot):
        assert torch.equal(logits(backbone.model), before), "who runs on the old version finishes on it"
    with served_by_tables(backbone, store.tables, new_slot):
        assert not torch.equal(logits(backbone.model), before)
    store.release(old)


def test_a_half_written_folder_settles(make_store: Callable[..., AdapterStore], folder: Path, zoo: Path) -> None:
    store = make_store()
    target = folder / "late"
    target.mkdir()
    shutil.copy(zoo / "adapter-10" / CONFIG_FILE, target)
    store.refresh()
    with pytest.raises(AdapterFormatError, match="missing"):
        store.resolve("late")
    data = (zoo / "adapter-10" / WEIGHTS_FILE).read_bytes()
    (target / WEIGHTS_FILE).write_bytes(data[:1000])
    store.refresh()
    with pytest.raises(AdapterFormatError, match=r"truncated|damaged"):
        store.resolve("late")
    (target / WEIGHTS_FILE).write_bytes(data)
    store.refresh()
    take(store, store.resolve("late"))


@pytest.mark.parametrize("replaced", [True, False])
def test_a_version_that_is_gone_before_it_was_loaded_fails(
    replaced: bool,
    make_store: Callable[..., AdapterStore],
    folder: Path,
    zoo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_book, "FAILURE_KEPT_S", 0.2)
    store = make_store(host_cache_bytes=0)
    old = store.resolve("adapter-00")
    assert store.get("adapter-00").residency is Residency.DISK
    shutil.rmtree(folder / "adapter-00")
    if replaced:
        shutil.copytree(zoo / "adapter-11", folder / "adapter-00")
    store.refresh()
    with pytest.raises(
        AdapterRejected if replaced else UnknownAdapter, match="was replaced" if replaced else "deleted"
    ):
        take(store, old)
    assert counts(store)["failed"] == 1
    shutil.rmtree(folder / "adapter-00", ignore_errors=True)
    shutil.copytree(zoo / "adapter-00", folder / "adapter-00")
    store.refresh()
    assert store.failure(old) is None, "its folder is back"
    take(store, old)


def test_a_version_that_is_gone_from_disk_is_served_from_the_host_cache(
    make_store: Callable[..., AdapterStore], folder: Path
) -> None:
    store = make_store()
    version = store.resolve("adapter-00")
    shutil.rmtree(folder / "adapter-00")
    take(store, version)
    store.refresh()
    with pytest.raises(UnknownAdapter):
        store.resolve("adapter-00")
    store.release(version)


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
    take(store, store.resolve("adapter-03"))
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
    time.sleep(load_book.FAILURE_KEPT_S)
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
            _reseed(folder / names[-1], rng.randrange(1000))
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
