"""From a TOML file to a checked configuration. Reads nothing but that file."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from polyhead_core.errors import ConfigError
from polyhead_trainer.config.adapter import METHODS, REFUSED_METHODS
from polyhead_trainer.config.base import Section
from polyhead_trainer.config.sections import RunConfig


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in `file` with `section.key=value` texts on top; values are TOML, bare words are strings.

    Raises ConfigError. Relative paths are relative to the working directory.
    """
    return parse_config(read_values(file), origin=str(file), overrides=overrides)


def read_values(file: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        # With the mark in front that editors on Windows write.
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}") from error


def parse_config(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    if "adapters" in values:
        raise ConfigError(
            f"{origin} describes several adapters ([[adapters]]), which is for `trainer run` alone; `trainer evaluate` "
            "takes their directories"
        )
    for text in overrides:
        override(values, text)
    _refuse_method(values, origin)
    try:
        # Through JSON, because strict validation turns texts into paths only there.
        return RunConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(explain(problem) for problem in error.errors())) from error


def _refuse_method(values: dict[str, Any], origin: str) -> None:
    adapter = values.get("adapter")
    method = adapter.get("method") if isinstance(adapter, dict) else None
    reason = REFUSED_METHODS.get(str(method).lower().replace("-", "").replace("_", ""))
    if reason is not None:
        raise ConfigError(f"{origin}: adapter.method = {method}: {reason}")


def override(values: dict[str, Any], text: str) -> None:
    """Puts `section.key=value` into the nested `values`. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text!r}: expected section.key=value")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {text!r}: {section} is a value, not a section")
    try:
        values[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        values[name] = value.strip()


def explain(problem: ErrorDetails) -> str:
    path = [str(part) for part in problem["loc"]]
    if not path:  # of the whole configuration: two sections that do not fit each other
        return problem["msg"].removeprefix("Value error, ")
    if path[0] == "adapter" and len(path) > 1:
        method = path.pop(1)  # pydantic names the union's member too
        if problem["type"] == "extra_forbidden" and len(path) == 2:
            own = METHODS[method].model_fields
            near = difflib.get_close_matches(path[1], own, n=1)
            hint = f"did you mean adapter.{near[0]}?" if near else f"known are {', '.join(own)}"
            return f"unknown setting {'.'.join(path)} of the method {method}; {hint}"
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name}{_nearest(path)}"
    if problem["type"] == "missing":
        return f"the setting {name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{name} = {problem['input']!r}: {message}" if not isinstance(problem["input"], dict) else f"{name}: {message}"
    )


def _nearest(path: list[str]) -> str:
    known = {".".join(key): key for key in known_settings()}
    same_name = [name for name, key in known.items() if key[-1] == path[-1]]
    near = same_name or difflib.get_close_matches(".".join(path), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def flat_settings(config: RunConfig) -> dict[str, str]:
    """Every setting of a run as JSON by its dotted name."""
    return _flat(config.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return found


def known_settings() -> dict[tuple[str, ...], FieldInfo]:
    """Every setting by its path, sections first opened in the order in which they are declared."""
    found: dict[tuple[str, ...], FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if name == "adapter":
            for settings in METHODS.values():
                for inner, inner_field in settings.model_fields.items():
                    found.setdefault((name, inner), inner_field)
            continue
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({(name, inner): inner_field for inner, inner_field in section.model_fields.items()})
        else:
            found[(name,)] = field
    return found
