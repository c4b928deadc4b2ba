"""The recipes that ship with the trainer: list, read, copy. Each is a configuration for `trainer run`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from polyhead_core.errors import ConfigError
from polyhead_trainer.errors import OutputExists

_SUFFIX = ".toml"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    text: str

    @property
    def summary(self) -> str:
        """The comment that every recipe opens with."""
        return self.text.partition("\n")[0].removeprefix("#").strip()


def recipes() -> list[Recipe]:
    folder = resources.files("polyhead_trainer").joinpath("recipes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(_SUFFIX)), key=lambda file: file.name)
    return [Recipe(name=file.name.removesuffix(_SUFFIX), text=file.read_text(encoding="utf-8")) for file in files]


def find_recipe(name: str) -> Recipe:
    """Raises ConfigError naming the nearest recipe; `-` and `_` are the same, `.toml` may be there."""
    known = {recipe.name: recipe for recipe in recipes()}
    wanted = name.removesuffix(_SUFFIX).replace("-", "_")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no recipe {name!r}; {hint}")


def copy_recipe(name: str, destination: Path | None) -> Path:
    """Writes the recipe to a file, or into a folder under its own name. Raises ConfigError, OutputExists."""
    recipe = find_recipe(name)
    target = destination or Path()
    if target.is_dir():
        target /= recipe.name + _SUFFIX
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(recipe.text)
    except FileExistsError as error:
        raise OutputExists(f"{target} is there already: it is not touched; name another file") from error
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    return target
