"""From a data file to its rows, one at a time: no file is ever held whole. What a row means is in `forms`."""

from __future__ import annotations

import codecs
import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from polyhead_trainer.data.rows import Row, labels_by_name
from polyhead_trainer.errors import DataError

PARQUET_ROWS = 256
"""Rows that are made into Python objects at a time."""
PARQUET_BUFFER_BYTES = 2**20
"""Read ahead in each column: without it, pyarrow holds all of a group of rows, which can be all of the file."""
MAX_CSV_FIELD_CHARACTERS = 2**31 - 1
"""A C long is 32 bits wide on some systems."""


@dataclass(frozen=True)
class DataFile:
    """Implements Source."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[Row]:
        try:
            with self.path.open("rb") as file:
                yield from FORMATS[self.path.suffix.lower()](file, self.name)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}") from error

    def digest(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}") from error


def data_file(path: Path) -> DataFile:
    """Raises DataError for a format that is not known."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{path}: unknown format {path.suffix!r}: expected a file that ends in {', '.join(FORMATS)}")
    return DataFile(path)


def _json_lines(file: IO[bytes], name: str) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield Row(f"{name}:{number}", text)


def _csv(file: IO[bytes], name: str) -> Iterator[Row]:
    """Every value is a text: `007` stays what it is, and so does `NA`."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    # The standard library's reader, and not pandas' behind `datasets`: it knows the line, and guesses no types.
    reader = csv.reader(_text_lines(file, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for values in reader:
            origin = f"{name}:{start}"
            start = reader.line_num + 1
            if not values:
                continue
            if not header:
                header = values
                if len(set(header)) != len(header):
                    raise DataError(f"{origin}: two columns of one name: {', '.join(header)}")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{origin}: {len(values)} values, expected {len(header)}, one for each of {', '.join(header)}"
                )
            yield Row(origin, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}:{start}: not valid CSV: {error}") from error


def _text_lines(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: not UTF-8: {error}") from error


def _parquet(file: IO[bytes], name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        named = labels_by_name(table.schema_arrow)
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for record in batch.to_pylist():
                number += 1
                origin = f"{name}: row {number}"
                yield Row(origin, named(record, origin))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error


FORMATS: dict[str, Callable[[IO[bytes], str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}
"""By the end of the file's name."""
