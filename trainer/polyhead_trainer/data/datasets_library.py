"""Data sets that the `datasets` library keeps in Arrow files: of `save_to_disk`, and of the Hugging Face hub.

They are mapped into memory and not read into it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from polyhead_trainer.data.rows import Row, labels_by_name
from polyhead_trainer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


@dataclass(frozen=True)
class ArrowDataset:
    """Implements Source."""

    name: str
    dataset: Dataset
    from_hub: bool

    def rows(self) -> Iterator[Row]:
        named = labels_by_name(self.dataset.features.arrow_schema)
        for number, record in enumerate(self.dataset, start=1):
            origin = f"{self.name}: row {number}"
            yield Row(origin, named(record, origin))

    def digest(self) -> bytes:
        """Of the Arrow files; of a data set of the hub its fingerprint, which holds revision, configuration, split."""
        if self.from_hub:
            return hashlib.sha256(f"{self.name} {self.dataset._fingerprint}".encode()).digest()
        whole = hashlib.sha256()
        for entry in self.dataset.cache_files:
            with Path(entry["filename"]).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.digest()


def is_saved_dataset(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_dataset(directory: Path, split: str | None, name: str) -> ArrowDataset:
    """What `save_to_disk` left. Raises DataError."""
    import datasets
    import pyarrow

    try:
        found = datasets.load_from_disk(directory)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{directory}: cannot be read as a data set of save_to_disk: {error}") from error
    return ArrowDataset(name, _one_split(found, split, name), from_hub=False)


def hub_dataset(dataset: str, config: str | None, split: str | None, name: str) -> ArrowDataset:
    """From the hub, or from the library's cache where the hub cannot be reached. Raises DataError."""
    if Path(dataset).exists():
        raise DataError(f"{name}: there is a directory {dataset} here too: rename it, or name it without hub:")
    return ArrowDataset(name, _one_split(_from_hub(dataset, config, split, name), split, name), from_hub=True)


@functools.cache
def _from_hub(dataset: str, config: str | None, split: str | None, name: str) -> Dataset | DatasetDict:
    """Once per process: what is learned is then what was hashed, though the hub may change meanwhile."""
    import datasets

    try:
        return cast("Dataset | DatasetDict", datasets.load_dataset(dataset, config, split=split))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot load this data set from the hub or the cache: {error}; expected "
            "hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIGURATION:SPLIT, and a hub that can be reached"
        ) from error


def _one_split(found: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    if not isinstance(found, dict):
        return found
    return cast("Dataset", choose_split(found, split, name))


def choose_split(found: dict[str, object], split: str | None, name: str) -> object:
    """The one that is named, or the only one. Raises DataError."""
    splits = ", ".join(map(str, found))
    if split is None and len(found) > 1:
        raise DataError(f"{name} has the splits {splits}: name one, as {name}:{next(iter(found))}")
    if split is not None and split not in found:
        raise DataError(f"{name}: no split {split!r}; there are {splits}")
    return found[split] if split is not None else next(iter(found.values()))
