"""The store's parts one by one: residency, host cache, load book, pool, catalog."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from polyhead_core.errors import AdapterFormatError, AdapterRejected, EngineFailure, UnknownAdapter
from polyhead_core.kernels.tables import UNIT
from polyhead_core.sites import Site, SiteKind, SiteMap
from polyhead_server.store import catalog as catalog_module
from polyhead_server.store import load_book
from polyhead_server.store.catalog import AdapterFacts, Catalog, CatalogEntry
from polyhead_server.store.host_cache import HostCache
from polyhead_server.store.load_book import LoadBook
from polyhead_server.store.packing import Extent, PackedAdapter, Part
from polyhead_server.store.pool import AdapterPool
from polyhead_server.store.residency import PROTECTION_S, ResidencyTable


def _resident(table: ResidencyTable, name: str, *, awaited: bool = False, now_s: float = 0.0) -> int:
    resident = table.begin(name, [len(table)], 1, awaited=awaited)
    table.finish(name)
    table.publish(now_s)
    return resident.slot


def _evictable(table: ResidencyTable, now_s: float = 0.0) -> list[str]:
    return [resident.content_hash for resident in table.evictable(now_s)]


def test_the_least_recently_used_go_first() -> None:
    table = ResidencyTable(3)
    for name in "abc":
        _resident(table, name)
    table.pin("a")
    assert _evictable(table) == ["b", "c"], "what a request needs stays"
    table.unpin("a")
    assert _evictable(table) == ["b", "c", "a"]
    table.set_user_pinned({"b"})
    assert _evictable(table) == ["c", "a"]
    table.drop("c")
    assert table.has_free_slot
    table.check_integrity()


def test_a_resident_on_its_way_neither_goes_nor_is_pinned() -> None:
    table = ResidencyTable(1)
    table.begin("a", [0], 1, awaited=False)
    assert _evictable(table) == []
    with pytest.raises(AssertionError):
        table.pin("a")
    table.finish("a")
    assert [resident.content_hash for resident in table.publish(0.0)] == ["a"]
    assert table.publish(0.0) == []
    assert table.pin("a") == 0
    assert table.num_pins == 1
    with pytest.raises(AssertionError):
        table.drop("a")


def test_what_a_request_waits_for_stays_until_it_had_its_turn() -> None:
    table = ResidencyTable(2)
    _resident(table, "a", awaited=True, now_s=10.0)
    assert _evictable(table, 10.0) == []
    assert _evictable(table, 10.0 + PROTECTION_S) == ["a"], "but not for ever: the request may be gone"
    table.pin("a")
    table.unpin("a")
    assert _evictable(table, 10.0) == ["a"], "it had its turn"


def _packed(name: str, num_units: int) -> PackedAdapter:
    units = torch.zeros(num_units, 64)
    return PackedAdapter(
        content_hash=name, peft_type="LORA", max_rank=1, num_parameters=1, file_bytes=1, extents=(), units=units
    )


def test_host_cache_forgets_the_least_recently_used() -> None:
    cache = HostCache(max_bytes=3 * 256)
    for name in "abc":
        cache.put(_packed(name, 1))
    assert cache.get("a") is not None
    cache.put(_packed("d", 1))
    assert ["a" in cache, "b" in cache, "c" in cache, "d" in cache] == [True, False, True, True]
    cache.put(_packed("e", 2))
    assert cache.num_bytes == 3 * 256
    assert "c" not in cache
    cache.put(_packed("huge", 4))
    assert "huge" not in cache
    assert "e" in cache, "what never fits drives nothing out"
    cache.drop("e")
    cache.check_integrity()
    assert cache.num_bytes == 256


class FakeStream:
    """In place of the pool's CUDA stream: remembers what was asked of it, and what the arena held at the time."""

    def __init__(self, pool: AdapterPool) -> None:
        self._arena = pool.tables.arena
        self.calls: list[tuple[str, object, float]] = []

    def wait_stream(self, other: object) -> None:
        self.calls.append(("wait", other, float(self._arena.max())))

    def synchronize(self) -> None:
        self.calls.append(("synchronize", None, float(self._arena.max())))


def test_on_a_device_a_write_waits_for_the_steps_that_are_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read may be what an evicted adapter left at the same units."""
    site = Site(index=0, path="a", kind=SiteKind.LINEAR, in_features=UNIT, out_features=8)
    pool = AdapterPool(
        SiteMap((site,)), num_units=4, num_slots=1, max_rank=8, dtype=torch.float32, device=torch.device("cpu")
    )
    pool._stream = stream = FakeStream(pool)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"steps on {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    packed = PackedAdapter(
        content_hash="a", peft_type="LORA", max_rank=8, num_parameters=UNIT, file_bytes=0,
        extents=(Extent(0, Part.A, 0, 1), Extent(0, Part.B, 0, 2)), units=torch.full((3, UNIT), 7.0),
    )  # fmt: skip
    row = pool.write(packed, [3, 0])
    assert stream.calls == [("wait", "steps on cpu", 0.0), ("synchronize", None, 7.0)]
    assert row.pages[0, 0].tolist() == [3, 0]
    assert pool.tables.arena.view(4, UNIT)[:, 0].tolist() == [7.0, 7.0, 0.0, 7.0]


def test_a_failure_is_told_for_a_moment_and_then_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_book, "FAILURE_KEPT_S", 0.05)
    book = LoadBook()
    assert book.begin("a", awaited=False)
    assert not book.begin("a", awaited=True), "one load at a time"
    assert book.is_awaited("a")
    error = EngineFailure("disk on fire")
    book.fail("a", error)
    book.end("a")
    assert "a" not in book
    assert book.failure("a") is error
    assert book.failure("a") is error, "everybody who waits hears of it"
    assert not book.begin("a", awaited=True)
    time.sleep(0.06)
    assert book.failure("a") is None
    assert book.begin("a", awaited=True)


def test_a_load_without_room_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_book, "ROOM_RETRY_S", 10.0)
    book = LoadBook()
    assert book.begin("a", awaited=True)
    book.found_no_room("a")
    book.end("a")
    assert not book.begin("a", awaited=True)
    book.room_came_free()
    assert book.begin("a", awaited=True)


class Admission:
    """Stands for reading and validating: the first line of the config is the content; `bad` is refused."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    def __call__(self, path: Path) -> AdapterFacts:
        self.reads.append(path.name)
        content = (path / "adapter_config.json").read_text()
        if content == "bug":
            raise RuntimeError("unforeseen")
        if content == "bad":
            raise AdapterFormatError(f"adapter {path.name!r}: bad")
        return AdapterFacts(
            content_hash=content, peft_type="LORA", max_rank=1, num_parameters=1, file_bytes=1, num_units=1
        )


def _write(folder: Path, name: str, content: str) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "adapter_config.json").write_text(content)
    (folder / name / "adapter_model.safetensors").write_text(content)


def _old(folder: Path) -> None:
    """As if nobody had touched the folder for an hour."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def admission() -> Admission:
    return Admission()


@pytest.fixture
def catalog(tmp_path: Path, admission: Admission, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    # ctime cannot be set: without this every file would be young.
    monkeypatch.setattr(catalog_module, "_is_young", lambda signature: False)
    changes: list[tuple[str, CatalogEntry | None]] = []
    catalog = Catalog(tmp_path, admission, lambda *change: changes.append(change), max_file_bytes=1 << 20)
    catalog.changes = changes  # type: ignore[attr-defined]
    return catalog


def test_every_folder_with_a_config_is_an_adapter(catalog: Catalog, admission: Admission, tmp_path: Path) -> None:
    _write(tmp_path, "anna", "1")
    _write(tmp_path, "berta", "bad")
    _write(tmp_path, "carla", "bug")
    _write(tmp_path, ".hidden", "1")
    _write(tmp_path, "new\nline", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    catalog.refresh()
    catalog.check_integrity()
    assert catalog.entries.keys() == {"anna", "berta", "carla"}
    assert catalog.entries["anna"].facts is not None
    assert isinstance(catalog.entries["berta"].error, AdapterFormatError)
    assert "internal error" in str(catalog.entries["carla"].error)
    assert catalog.folders_of("1") == [tmp_path / "anna"]
    catalog.refresh()
    assert admission.reads == ["anna", "berta", "carla"], "what has not changed is not read again"


def test_changes_are_found(catalog: Catalog, admission: Admission, tmp_path: Path) -> None:
    _write(tmp_path, "anna", "1")
    catalog.refresh()
    (tmp_path / "anna" / "README.md").write_text("no change of the adapter")
    catalog.refresh()
    assert admission.reads == ["anna"]
    _write(tmp_path, "anna", "bad")
    catalog.refresh()
    assert catalog.entries["anna"].facts is None, "the version before is not served under the name any more"
    assert catalog.folders_of("1") == []
    _write(tmp_path, "anna", "22")
    catalog.refresh()
    assert catalog.folders_of("22") == [tmp_path / "anna"]
    (tmp_path / "anna").rename(tmp_path / "berta")
    catalog.refresh()
    assert catalog.entries.keys() == {"berta"}
    (tmp_path / "berta" / "adapter_config.json").unlink()
    catalog.refresh()
    assert not catalog.entries


def test_a_folder_swapped_by_a_link_is_a_change(catalog: Catalog, tmp_path: Path) -> None:
    _write(tmp_path, "versions-1", "1")
    _write(tmp_path, "versions-2", "2")
    (tmp_path / "anna").symlink_to("versions-1")
    catalog.refresh()
    (tmp_path / "next").symlink_to("versions-2")
    (tmp_path / "next").rename(tmp_path / "anna")
    catalog.refresh()
    facts = catalog.entries["anna"].facts
    assert facts is not None
    assert facts.content_hash == "2"


def test_a_change_without_a_new_time_stamp_is_found(
    tmp_path: Path, admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "SETTLE_S", 0.05)
    monkeypatch.setattr(catalog_module, "_is_young", lambda signature: True)
    monkeypatch.setattr(catalog_module, "_signature", lambda path: ())
    catalog = Catalog(tmp_path, admission, lambda name, entry: None, max_file_bytes=1 << 20)
    _write(tmp_path, "anna", "1")
    catalog.refresh()
    _write(tmp_path, "anna", "2")
    catalog.refresh()
    assert catalog.folders_of("1"), "not looked at again yet"
    time.sleep(0.06)
    catalog.refresh()
    assert catalog.folders_of("2")


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), MemoryError()])
def test_what_may_pass_is_tried_again(
    catalog: Catalog, admission: Admission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    monkeypatch.setattr(catalog_module, "PASSING_RETRY_S", 0.05)
    _write(tmp_path, "anna", "1")
    _write(tmp_path, "berta", "bad")

    def fail(path: Path) -> AdapterFacts:
        admission.reads.append(path.name)
        raise cause

    monkeypatch.setattr(catalog, "_admit", fail)
    catalog.refresh()
    assert catalog.entries["anna"].error is not None
    monkeypatch.setattr(catalog, "_admit", admission)
    catalog.refresh()
    assert catalog.entries["anna"].error is not None, "not at once"
    time.sleep(0.06)
    catalog.refresh()
    assert catalog.folders_of("1")
    reads = list(admission.reads)
    time.sleep(0.06)
    catalog.refresh()
    assert admission.reads == reads, "a content that is bad stays so"


def test_a_mistaken_name_is_compared_with_few() -> None:
    names = [f"customer-{number:05d}" for number in range(5000)]
    near = catalog_module._neighbours("customer-00137x", names)
    assert len(near) == catalog_module.COMPARED_NAMES
    assert {"customer-00137", "customer-00138"} <= set(near)


def test_a_vanished_folder_of_folders_is_empty(catalog: Catalog, tmp_path: Path) -> None:
    _write(tmp_path, "anna", "1")
    catalog.refresh()
    tmp_path.rename(tmp_path.parent / "elsewhere")
    catalog.refresh()
    assert not catalog.entries


def test_a_file_in_the_place_of_the_folder_is_an_empty_one(catalog: Catalog, tmp_path: Path) -> None:
    _write(tmp_path, "anna", "1")
    catalog.refresh()
    tmp_path.rename(tmp_path.parent / "away")
    tmp_path.write_text("no folder")
    catalog.refresh()
    assert not catalog.entries
    with pytest.raises(UnknownAdapter):
        catalog.entry("anna")


def test_a_folder_that_cannot_be_read_keeps_what_is_known(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, "anna", "1")
    catalog.refresh()
    monkeypatch.setattr(os, "listdir", partial(_fail, PermissionError))
    for _ in range(3):
        catalog.refresh()
    assert catalog.entries.keys() == {"anna"}
    assert sum("adapters folder cannot be read" in record.message for record in caplog.records) == 1


def test_what_stays_as_it_is_is_said_once(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog_module, "PASSING_RETRY_S", 0.0)
    _write(tmp_path, "new\nline", "1")
    _write(tmp_path, "anna", "1")

    def fail(path: Path) -> AdapterFacts:
        raise AdapterFormatError("anna: a disk's trouble") from OSError(5, "Input/output error")

    monkeypatch.setattr(catalog, "_admit", fail)
    for _ in range(3):
        catalog.refresh()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in warnings] == ["a folder is left out", "refused"]
    (tmp_path / "new\nline").rename(tmp_path / "other\nline")
    catalog.refresh()
    assert "other" in caplog.records[-1].message


@pytest.mark.parametrize("error", [PermissionError, RuntimeError])
def test_it_polls_and_outlives_a_failing_scan(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    catalog.start(0.01)
    try:
        monkeypatch.setattr(os, "listdir", partial(_fail, error))
        time.sleep(0.05)
        monkeypatch.undo()
        _write(tmp_path, "anna", "1")
        _wait_until(lambda: "anna" in catalog.entries)
    finally:
        catalog.stop()


def _fail(error: type[Exception], path: object) -> list[str]:
    raise error(path)


def _wait_until(condition, timeout_s: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_rejected_adapter_keeps_its_reason(catalog: Catalog, tmp_path: Path) -> None:
    _write(tmp_path, "anna", "bad")
    catalog.refresh()
    entry = catalog.entries["anna"]
    assert isinstance(entry.error, AdapterRejected)
    assert catalog.changes == [("anna", entry)]  # type: ignore[attr-defined]
