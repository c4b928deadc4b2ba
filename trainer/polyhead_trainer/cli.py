"""The `trainer` command. Imports what is heavy, or in an extra, only inside the verbs."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from polyhead_core.errors import PolyheadError
from polyhead_trainer.errors import MissingExtra

EXIT_USER_ERROR = 2

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Trains adapters that polyhead-server serves.")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; `trainer settings` lists what it may hold.")],
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting.")] = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option(help="Replace a finished run in the output directory.")] = False,
) -> None:
    """Trains one adapter and shows the same held-out examples before and after."""
    from rich.console import Console

    from polyhead_trainer.config import load_config

    loaded = load_config(config, set_)
    _quiet_libraries()
    from polyhead_trainer.run import run as run_config

    run_config(loaded, Console(), overwrite=overwrite)


@app.command()
def settings() -> None:
    """Lists every setting of a configuration, with its default and meaning."""
    from polyhead_trainer.config import known_settings

    for path, field in known_settings().items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        typer.echo(f"{'.'.join(path)} ({default})\n    {(field.description or '').replace(chr(10), ' ')}")


@app.command(name="demo-data")
def demo_data(
    output: Annotated[Path, typer.Argument(help="Folder for the JSONL files.")],
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
) -> None:
    """Downloads and prepares the demo's two tasks: tweet sentiment and the translation of interface texts."""
    from polyhead_trainer.demo_data import prepare

    for line in prepare(output, cache_dir):
        typer.echo(line)


def _quiet_libraries() -> None:
    """Keeps advice meant for the authors of our dependencies away from those who run a training."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")


def main() -> None:
    """Prints a user's mistake as one line and exits with 2."""
    try:
        try:
            app()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("polyhead"):
                raise
            raise MissingExtra(
                f"the package {error.name!r} is not installed; the trainer needs: pip install 'polyhead[trainer]'"
            ) from error
    except PolyheadError as error:
        print(f"trainer: {error.message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
