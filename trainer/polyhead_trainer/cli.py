"""The `trainer` command. Imports what is heavy, or in an extra, only inside the verbs."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from polyhead_core.errors import PolyheadError
from polyhead_trainer.errors import MissingExtra

EXIT_USER_ERROR = 2


class Target(enum.Enum):
    HUGGINGFACE = "huggingface"
    META = "meta"
    INT8 = "int8"


class FloatType(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


app = typer.Typer(no_args_is_help=True, add_completion=False, help="Trains adapters that polyhead-server serves.")
recipes_app = typer.Typer(no_args_is_help=True, help="Lists, shows and copies the recipes that ship with the trainer.")
app.add_typer(recipes_app, name="recipes")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; `trainer settings` lists what it may hold.")],
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting.")] = [],  # noqa: B006
    overwrite: Annotated[bool, typer.Option(help="Replace a finished run in the output directory.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint, if there is one.")] = False,
    nproc: Annotated[
        int, typer.Option(help="Processes on this machine that share the work; settings: parallel.", min=1)
    ] = 1,
) -> None:
    """Trains one adapter, or all in the file's tables of `adapters`, and shows held-out examples before and after."""
    from rich.console import Console

    from polyhead_trainer.config import TogetherConfig, load_run

    loaded = load_run(config, set_)
    quiet_libraries()
    if isinstance(loaded, TogetherConfig):
        from polyhead_trainer.together.run import run_together

        run_together(loaded, Console(), overwrite=overwrite, resume=resume, nproc=nproc).raise_for_failures()
        return
    if nproc > 1:
        from polyhead_trainer.parallel.launch import launch

        launch(loaded, nproc, overwrite=overwrite, resume=resume)
        return
    from polyhead_trainer.run import run as run_config

    run_config(loaded, Console(), overwrite=overwrite, resume=resume)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Meta's Llama directory, a Hugging Face directory, a .gguf file or `default`.")
    ],
    output: Annotated[Path, typer.Argument(help="Directory to make.")],
    to: Annotated[Target, typer.Option(help="Layout of the output.")],
    shards: Annotated[int, typer.Option(help="With --to meta: number of model-parallel files.", min=1)] = 1,
    calibrate: Annotated[
        bool, typer.Option(help="With --to int8: calibrate for Polyhead; without: LLM.int8 as bitsandbytes reads it.")
    ] = True,
    max_positions: Annotated[
        int | None, typer.Option(help="From Meta's layout: longest sequence; unset: as the published models.", min=1)
    ] = None,
    rope_factor: Annotated[
        float | None, typer.Option(help="From Meta's layout with scaled rope: its factor; unset: 8, or 32 if tied.")
    ] = None,
) -> None:
    """Converts a backbone: Meta's Llama layout to Hugging Face's and back, GGUF to Hugging Face's, any to int8."""
    quiet_libraries()
    from polyhead_trainer.convert.run import convert as convert_backbone

    remarks = convert_backbone(
        source,
        output,
        to.value,
        num_shards=shards,
        calibrate=calibrate,
        max_positions=max_positions,
        rope_factor=rope_factor,
    )
    for line in [f"{output} written", *remarks]:
        typer.echo(line)


@app.command()
def export(
    config: Annotated[Path, typer.Argument(help="TOML file of the run that was not finished.")],
    output: Annotated[Path, typer.Argument(help="Directory to make.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; unset: the latest.", min=1)] = None,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting.")] = [],  # noqa: B006
) -> None:
    """Writes what a checkpoint holds as a run would publish it: an adapter's directory, or Hugging Face's."""
    from polyhead_trainer.config import load_config

    loaded = load_config(config, set_)
    quiet_libraries()
    from polyhead_trainer.export import export as export_checkpoint

    exported = export_checkpoint(loaded, output, step=step)
    kind = "an adapter" if exported.is_adapter else "a whole model"
    typer.echo(f"{exported.output} written: {kind}, after step {exported.step}, from {exported.checkpoint}")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's directory, by the trainer or by peft.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Shows what an adapter directory holds: type, ranks, tensors, identity, backbone, metrics."""
    from polyhead_trainer.inspection import describe, inspect_adapter

    facts = inspect_adapter(adapter)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts), indent=1))
    else:
        typer.echo("\n".join(describe(facts)))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    backbone: Annotated[str | None, typer.Option(help="Its source; unset: the one that the adapter names.")] = None,
    dtype: Annotated[FloatType, typer.Option(help="Of the written weights; merged is in float32.")] = FloatType.FLOAT32,
) -> None:
    """Merges an adapter into a float copy of its backbone: a directory that transformers loads without peft."""
    quiet_libraries()
    from polyhead_trainer.merge import merge as merge_adapter

    merged = merge_adapter(adapter, out, backbone=backbone, dtype=dtype.value)
    typer.echo(f"{merged.output} written: {merged.source} with {adapter}")
    if merged.trained_on not in (None, "none"):
        typer.echo(f"the adapter was trained on {merged.trained_on}: on float weights its answers can differ a little")


@app.command()
def difference(
    base: Annotated[str, typer.Argument(help="The backbone before: directory, .gguf file, hub id or `default`.")],
    tuned: Annotated[str, typer.Argument(help="The same model after full fine-tuning.")],
    out: Annotated[Path, typer.Option(help="Adapter directory to make.")],
    rank: Annotated[int, typer.Option(help="Of the adapter, in every linear layer that changed.", min=1)],
    device: Annotated[str, typer.Option(help="Where the singular values are computed: `cpu` or `cuda`.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Exports what a full fine-tune changed as a LoRA adapter of a given rank, and says what that loses."""
    quiet_libraries()
    from polyhead_trainer.difference import describe, export_difference

    exported = export_difference(base, tuned, out, rank=rank, device=device)
    typer.echo(exported.to_json() if as_json else "\n".join(describe(exported)))


@app.command()
def publish(
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.")],
    folder: Annotated[Path, typer.Argument(help="The folder that the server watches.")],
    name: Annotated[str | None, typer.Option(help="Name to serve it by; unset: the directory's.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter of that name.")] = False,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ask this server first whether its backbone fits."),
    ] = None,
) -> None:
    """Copies an adapter into a server's folder: complete or not at all, while the server runs."""
    from polyhead_trainer.delivery import deliver

    delivered = deliver(adapter, folder, name=name, overwrite=overwrite, server=server)
    for line in [f"{delivered.path} written ({delivered.content_hash[:12]})", *delivered.remarks]:
        typer.echo(line)


@app.command()
def evaluate(
    subjects: Annotated[list[Path], typer.Argument(metavar="CONFIG|ADAPTER...", help="Runs, or adapters of runs.")],
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Measures finished adapters and their backbones again, on the same held-out examples or on others."""
    from rich.console import Console

    from polyhead_trainer.reevaluate import read_subject

    read = [read_subject(subject, set_) for subject in subjects]
    quiet_libraries()
    from polyhead_trainer.reevaluate import measure, print_measured

    measured = [measure(subject) for subject in read]
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in measured], indent=1, ensure_ascii=False))
    else:
        print_measured(Console(), measured)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="TOML file, as for `trainer run`; its data are read.")],
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides one setting.")] = [],  # noqa: B006
    nproc: Annotated[int, typer.Option(help="Processes, as for `trainer run`: bytes are those of one.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predicts the bytes of tensors that a run needs, part by part, without loading the backbone's weights.

    The interpreter with its libraries and the data come on top; on a GPU, CUDA's own context.
    """
    from polyhead_trainer.config import load_run

    loaded = load_run(config, set_)
    quiet_libraries()
    from polyhead_trainer.estimate import estimate as estimate_run

    parts = estimate_run(loaded, nproc=nproc).parts()
    if as_json:
        typer.echo(json.dumps(parts))
    else:
        typer.echo("\n".join(f"{name:<18} {num_bytes:>16,} bytes" for name, num_bytes in parts.items()))


@recipes_app.command(name="list")
def list_recipes() -> None:
    """Names the recipes that ship with the trainer."""
    from polyhead_trainer.recipe_book import recipes

    for recipe in recipes():
        typer.echo(f"{recipe.name}\n    {recipe.summary}")


@recipes_app.command(name="show")
def show_recipe(name: Annotated[str, typer.Argument(help="As `recipes list` names it.")]) -> None:
    """Prints one recipe."""
    from polyhead_trainer.recipe_book import find_recipe

    typer.echo(find_recipe(name).text, nl=False)


@recipes_app.command(name="copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="As `recipes list` names it.")],
    destination: Annotated[Path | None, typer.Argument(help="File or folder; unset: here.")] = None,
) -> None:
    """Copies one recipe, to be changed and run."""
    from polyhead_trainer.recipe_book import copy_recipe as copy_to

    typer.echo(f"{copy_to(name, destination)} written")


@app.command()
def settings() -> None:
    """Lists every setting of a configuration, with its default and meaning."""
    from polyhead_trainer.config import known_entry_settings, known_settings

    for path, field in (known_settings() | known_entry_settings()).items():
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


def quiet_libraries() -> None:
    """Keeps advice meant for the authors of our dependencies away from those who run a training."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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
