"""Where an output cannot be written, every verb says so in one line, and leaves nothing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from polyhead_trainer.convert.run import convert
from polyhead_trainer.delivery import deliver
from polyhead_trainer.demo_data import prepare
from polyhead_trainer.difference import export_difference
from polyhead_trainer.errors import OutputExists, StorageFailed
from polyhead_trainer.merge import merge
from polyhead_trainer.staging import new_directory
from tiny import save_adapter, save_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staging")
    save_backbone("llama", folder / "backbone")
    save_backbone("llama", folder / "other", seed=1)
    save_adapter(folder / "backbone", folder / "adapter", seed=1, r=4, target_modules=["q_proj"])
    (folder / "file").write_text("mine")
    return folder


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda folder, out: merge(folder / "adapter", out, cache_dir=folder / "cache"),
    "convert": lambda folder, out: convert(str(folder / "backbone"), out, "meta"),
    "difference": lambda folder, out: export_difference(
        str(folder / "backbone"), str(folder / "other"), out, rank=2, cache_dir=folder / "cache"
    ),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_an_output_without_a_place_is_named(folder: Path, verb: str) -> None:
    with pytest.raises(StorageFailed, match=r"cannot write .*file/out: .*; nothing was written"):
        WRITERS[verb](folder, folder / "file" / "out")


def test_a_full_disk_leaves_nothing_of_a_merge(folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    merge(folder / "adapter", tmp_path / "whole", cache_dir=folder / "cache")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match=r"cannot write .*/out: .*; free some space, .*nothing was written"):
            merge(folder / "adapter", tmp_path / "out", cache_dir=folder / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["whole"]


def test_what_fails_at_reading_is_not_said_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    with pytest.raises(StorageFailed, match="free some space"), new_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "theirs" / "thesis").mkdir(parents=True)
    with pytest.raises(OutputExists, match="filled by something else"), new_directory(tmp_path / "out"):
        (tmp_path / "theirs").rename(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_servers_folder_that_takes_nothing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (folder / "served").mkdir()
    monkeypatch.setattr("polyhead_trainer.delivery.tempfile.mkdtemp", refuse)
    with pytest.raises(StorageFailed, match=r"cannot write .*served/adapter: Permission denied; .* as it was"):
        deliver(folder / "adapter", folder / "served")


def test_demo_data_without_a_place_are_named(folder: Path) -> None:
    with pytest.raises(StorageFailed, match=r"cannot write .*file: "):
        prepare(folder / "file")
