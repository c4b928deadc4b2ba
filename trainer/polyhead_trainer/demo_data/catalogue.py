"""Reads gettext message catalogues (.po): just enough for pairs of source text and translation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

_FIELD = re.compile(r'(msgctxt|msgid|msgid_plural|msgstr|msgstr\[\d+\])\s+(".*")$')


def translations(text: str) -> Iterator[tuple[str, str]]:
    """(source, translation) of every finished entry; without plurals, fuzzy and obsolete entries and the header."""
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        current, is_fuzzy = "", False
        for line in block.splitlines():
            line = line.strip()
            if line.startswith("#"):
                is_fuzzy |= line.startswith("#,") and "fuzzy" in line
            elif match := _FIELD.match(line):
                current = match[1]
                fields[current] = ast.literal_eval(match[2])
            elif line.startswith('"') and current:
                fields[current] += ast.literal_eval(line)
        source, translation = fields.get("msgid"), fields.get("msgstr")
        if source and translation and not is_fuzzy:
            yield source, translation
