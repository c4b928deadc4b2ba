"""`rank_pattern` and `alpha_pattern`: which value holds for which module, exactly as PEFT resolves them.

A key is a regular expression from an untrusted file, so it is matched under a time limit and without the
interpreter's lock: the standard library's `re` has neither, and one hostile key would stop the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import regex  # type: ignore[import-untyped, unused-ignore]

from polyhead_core.adapter_directory import AdapterDirectory
from polyhead_server.adapters.validation import refuse_value

MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 512
TIME_LIMIT_S = 2.0
"""For all matches of one table."""

_Value = TypeVar("_Value")


class PatternTable(Generic[_Value]):
    """The first key that matches a module's path from its start, or from behind one of its dots, decides.

    The rule is that of `peft.utils.other.get_pattern_key`.
    """

    def __init__(self, adapter: AdapterDirectory, setting: str, table: Mapping[str, _Value], default: _Value) -> None:
        if len(table) > MAX_PATTERNS:
            refuse_value(adapter, setting, f"{len(table)} patterns", f"at most {MAX_PATTERNS}")
        self._adapter = adapter
        self._setting = setting
        self._default = default
        self._patterns = [(self._compile(key), value) for key, value in table.items()]
        self._seconds_left = TIME_LIMIT_S

    def resolve(self, path: str) -> _Value:
        started = time.monotonic()
        try:
            for pattern, value in self._patterns:
                if pattern.match(path, timeout=max(self._seconds_left, 0.001), concurrent=True):
                    return value
            return self._default
        except TimeoutError:
            refuse_value(self._adapter, self._setting, "patterns that take too long to match", "plain module names")
        finally:
            self._seconds_left -= time.monotonic() - started

    def _compile(self, key: str) -> Any:
        if len(key) > MAX_PATTERN_LENGTH:
            refuse_value(self._adapter, self._setting, key, f"patterns of at most {MAX_PATTERN_LENGTH} characters")
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            refuse_value(self._adapter, self._setting, key, f"a regular expression ({error})")
