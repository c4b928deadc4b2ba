"""From sources to examples, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polyhead_trainer.data.examples import Example
from polyhead_trainer.data.forms import parse_record
from polyhead_trainer.data.rows import Row
from polyhead_trainer.data.sources import open_sources
from polyhead_trainer.errors import DataError


def read_examples(entries: Iterable[str | Path], columns: Mapping[str, str] = {}) -> Iterator[Example]:
    """`entries` as in `data.train`; `columns` as in `data.columns`.

    Raises DataError naming file and line, or data set and row, and the field.
    """
    for source in open_sources(entries):
        is_empty = True
        for row in source.rows():
            is_empty = False
            yield parse_row(row, columns)
        if is_empty:
            raise DataError(f"{source.name} holds no examples")


def parse_row(row: Row, columns: Mapping[str, str] = {}) -> Example:
    """Raises DataError."""
    record = row.content if isinstance(row.content, dict) else _json(row.content, row.origin)
    return parse_record(record, row.origin, columns)


def _json(line: bytes, origin: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not valid JSON: {error}; expected one object on every line") from error
