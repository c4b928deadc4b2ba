"""What an entry of `data.train` or `data.held_out` names: a file, a directory, a data set of the hub."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from polyhead_trainer.data.datasets_library import choose_split, hub_dataset, is_saved_dataset, saved_dataset
from polyhead_trainer.data.files import FORMATS, data_file
from polyhead_trainer.data.rows import Source
from polyhead_trainer.errors import DataError

HUB = re.compile(r"hub:(?P<name>[^:\[]+)(?P<parts>(:[^:\[]+(\[[^\]]*\])?){0,2})")


def open_sources(entries: Iterable[str | Path]) -> list[Source]:
    """In their order; a directory of files is opened as its files. Raises DataError."""
    return [source for entry in entries for source in _open(str(entry))]


def hash_sources(entries: Iterable[str | Path]) -> str:
    """SHA-256 over the contents in their order: the identity of the data, recorded with the adapter.

    Raises DataError.
    """
    digest = hashlib.sha256()
    for source in open_sources(entries):
        digest.update(source.digest())
    return digest.hexdigest()


def _open(entry: str) -> list[Source]:
    if entry.startswith("hub:"):
        return [_hub(entry)]
    path, split = Path(entry), None
    if not path.exists() and ":" in entry:
        directory, _, split = entry.rpartition(":")
        if not Path(directory).is_dir():
            raise DataError(f"cannot read {entry}: no file of this name, and no directory {directory} with splits")
        path = Path(directory)
    if not path.is_dir():
        return [data_file(path)]
    if is_saved_dataset(path):
        return [saved_dataset(path, split, entry)]
    return [data_file(file) for file in _files_of_split(path, split, entry)]


def _hub(entry: str) -> Source:
    match = HUB.fullmatch(entry)
    if match is None:
        raise DataError(f"{entry}: expected hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIGURATION:SPLIT")
    # A slice of a split, as in train[:80%], has a colon of its own.
    parts = re.findall(r":([^:\[]+(?:\[[^\]]*\])?)", match["parts"])
    split = parts[-1] if parts else None
    return hub_dataset(match["name"], parts[0] if len(parts) == 2 else None, split, entry)


def _files_of_split(directory: Path, split: str | None, name: str) -> list[Path]:
    """By their names, as `datasets` reads them: `train-00000-of-00002.parquet` is of the split train."""
    from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns

    formats = list(FORMATS)
    files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in FORMATS)
    if not files:
        raise DataError(f"{directory} holds no data files: expected names that end in {', '.join(formats)}")
    base = glob.escape(str(directory))  # else `data [v2]` is no folder, and `set*` others besides
    patterns = get_data_patterns(base)
    by_split = DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=formats)
    chosen = cast(DataFilesList, choose_split({str(key): value for key, value in by_split.items()}, split, name))
    placed = {Path(file).resolve() for some in by_split.values() for file in some}
    odd = [str(file) for file in files if file.resolve() not in placed]
    if odd:
        raise DataError(
            f"{directory}: {', '.join(odd)}: of none of the splits {', '.join(map(str, by_split))} by their names: "
            "name the files one by one, or move these elsewhere"
        )
    return [Path(file) for file in chosen]
