"""From files to examples. Owns the formats of files; what a record means is in `forms`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polyhead_trainer.data.examples import Example
from polyhead_trainer.data.forms import parse_record
from polyhead_trainer.errors import DataError


def read_jsonl(file: Path) -> list[Example]:
    """Raises DataError naming file, line and field."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    places = [(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    examples = [parse_record(_json(line, origin), origin) for line, origin in places]
    if not examples:
        raise DataError(f"{file} holds no examples")
    return examples


def _json(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{origin}: not valid JSON: {error}") from error


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the files' contents in their order: the identity of the data, recorded with the adapter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
