"""The adapter store and its folder: unknown, refused, replaced, half-written and deleted adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_making import TinyBackbone, logits, served_by_tables
from store_making import backbone as backbone
from store_making import counts, take
from store_making import folder as folder
from store_making import make_store as make_store
from store_making import zoo as zoo

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from polyhead_core.errors import AdapterFormatError, AdapterRejected, InvalidRequest, UnknownAdapter
from polyhead_server.store import load_book
from polyhead_server.store.residency import Residency
from polyhead_server.store.store import AdapterStore


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
