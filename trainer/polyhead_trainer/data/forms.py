"""The forms of an example in a file: which fields a record must have, and what is said when it has others."""

from __future__ import annotations

from typing import Any

from polyhead_trainer.data.examples import Example
from polyhead_trainer.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def parse_record(record: Any, origin: str) -> Example:
    """Raises DataError naming the field; `origin` says where the record is from."""
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}")
    if set(record) == {"messages"}:
        return Example(origin=origin, messages=_messages(record["messages"], origin))
    if set(record) != {"prompt", "completion"}:
        raise DataError(
            f'{origin}: expected the fields "prompt" and "completion", or "messages" alone; '
            f"got {', '.join(map(repr, record)) or 'none'}"
        )
    prompt, completion = (_text(record[name], f"{origin}: {name}") for name in ("prompt", "completion"))
    return Example(origin=origin, prompt=prompt, completion=completion)


def _messages(value: Any, origin: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: messages: expected a list of messages")
    for index, message in enumerate(value):
        where = f"{origin}: messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f'{where}: expected an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise DataError(f"{where}.role = {message['role']!r}: expected one of {', '.join(ROLES)}")
        _text(message["content"], f"{where}.content")
    if value[-1]["role"] != "assistant":
        raise DataError(
            f"{origin}: messages[{len(value) - 1}].role = {value[-1]['role']!r}: the last must be assistant"
        )
    return tuple(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, got {type(value).__name__}")
    if not value:
        raise DataError(f"{where}: must not be empty")
    return value
