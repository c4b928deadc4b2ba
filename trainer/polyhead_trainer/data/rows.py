"""One row of a source, before it is known whether it is an example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from polyhead_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow

NO_LABEL = -1
"""What data sets hold where a row's class is kept secret."""


@dataclass(frozen=True, slots=True)
class Row:
    origin: str
    """`file:line` or `source: row N`, counted from 1, for messages."""
    content: bytes | dict[str, Any]
    """A line of JSON, not parsed yet: whoever skips rows need not pay for that; or values by column."""


class Source(Protocol):
    """Something that can be read from the start as often as needed."""

    @property
    def name(self) -> str: ...

    def rows(self) -> Iterator[Row]:
        """In their order. Raises DataError."""

    def digest(self) -> bytes:
        """Of the contents. Raises DataError."""


def labels_by_name(schema: pyarrow.Schema) -> Callable[[dict[str, Any], str], dict[str, Any]]:
    """(record, origin) -> record, with the classes' names where `datasets` wrote their numbers (ClassLabel)."""
    if b"huggingface" not in (schema.metadata or {}):
        return lambda record, origin: record
    from datasets import ClassLabel, Features

    features = Features.from_arrow_schema(schema)
    classes = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}

    def named(record: dict[str, Any], origin: str) -> dict[str, Any]:
        for column, names in classes.items():
            value = record.get(column)
            if value is not None and not 0 <= value < len(names):
                secret = " (the classes of this split are not given)" if value == NO_LABEL else ""
                raise DataError(f"{origin}: {column}: class {value}{secret}: expected 0 to {len(names) - 1}")
            if value is not None:
                record[column] = names[value]
        return record

    return named
