"""The forms of an example in a file: which fields a record must have, and what is said when it has others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polyhead_trainer.data.examples import Example, Form
from polyhead_trainer.errors import DataError

_HALF_OF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""What JSON's \\u can write, and no tokenizer can read."""
ROLES = ("system", "user", "assistant", "tool")
TEXT_FORMS: dict[tuple[str, ...], Form] = {
    ("prompt", "completion"): "completion",
    ("text", "label"): "classification",
    ("prompt", "chosen", "rejected"): "preference",
}
"""By the fields of a record, which are all texts."""
FIELDS = (*TEXT_FORMS, ("messages",))
"""Of each form."""


def parse_record(record: Any, origin: str, columns: Mapping[str, str] = {}) -> Example:
    """`origin` says where the record is from, `columns` where it has its fields. Raises DataError naming the field."""
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}")
    if columns:
        record = _fields(record, origin, columns)
    if set(record) == {"messages"}:
        return Example(origin=origin, messages=_messages(record["messages"], origin), form="messages")
    for fields, form in TEXT_FORMS.items():
        if set(record) == set(fields):
            texts = [_text(_plain(record[name], name), f"{origin}: {name}") for name in fields]
            if len(texts) == 3 and texts[1] == texts[2]:
                raise DataError(f"{origin}: chosen and rejected are the same text: nothing is preferred")
            rejected = texts[2] if len(texts) == 3 else ""
            return Example(origin=origin, prompt=texts[0], completion=texts[1], rejected=rejected, form=form)
    known = "; ".join(" and ".join(f'"{name}"' for name in fields) for fields in TEXT_FORMS)
    raise DataError(
        f'{origin}: expected the fields {known}; or "messages" alone; got {", ".join(map(repr, record)) or "none"}'
        f"{'' if columns else '; data.columns says which columns hold them'}"
    )


def _fields(record: dict[str, Any], origin: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """What `columns` names, under our names. A record that has our names is taken as it is: sources may differ."""
    absent = {field: column for field, column in columns.items() if column not in record}
    if not absent:
        return {field: record[column] for field, column in columns.items()}
    if set(record) == set(columns):
        return record
    field, column = next(iter(absent.items()))
    raise DataError(
        f"{origin}: no {column!r}, which data.columns names for {field!r}; there are "
        f"{', '.join(map(repr, record)) or 'none'}"
    )


def _plain(value: Any, field: str) -> Any:
    """Classes are often numbers; every label is a text here."""
    return str(value) if field == "label" and type(value) is int else value


def _messages(value: Any, origin: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: messages: expected a list of messages")
    messages = [_message(message, f"{origin}: messages[{index}]") for index, message in enumerate(value)]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{origin}: messages[{len(value) - 1}].role = {value[-1]['role']!r}: the last must be assistant"
        )
    return tuple(messages)


def _message(message: Any, where: str) -> dict[str, str]:
    """Tables have a column for everything that any message of them has: what is null here is not there."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        got = ", ".join(map(repr, message)) if isinstance(message, dict) else type(message).__name__
        raise DataError(f'{where}: expected an object with "role" and "content", got {got or "none"}')
    if others := [key for key, part in message.items() if key not in ("role", "content") and part is not None]:
        raise DataError(f'{where}: expected "role" and "content" alone, got {others[0]!r} as well')
    if message["role"] not in ROLES:
        raise DataError(f"{where}.role = {message['role']!r}: expected one of {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message["content"], f"{where}.content")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, got {type(value).__name__}")
    if not value:
        raise DataError(f"{where}: must not be empty")
    if not value.isascii() and (half := _HALF_OF_A_CHARACTER.search(value)):
        raise DataError(
            f"{where}: {half[0]!a} after {half.start()} characters is half of one: the text was cut within a character"
        )
    return value
