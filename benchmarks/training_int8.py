"""Is it better to train an adapter on the int8 backbone that serves it, or on the bfloat16 one it was made from?

The demo's two recipes are trained on both, with several seeds; every adapter is then measured on int8: the held-out
loss that its users get. (Those trained on int8 were measured so by their own run.)
    python benchmarks/training_int8.py [--recipes tweet_sentiment ui_spanish] [--seeds 2] [--steps 80] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine_facts, silence_peft
from rich.console import Console
from training_files import demo_data, write_results

from polyhead_trainer.config import parse_config
from polyhead_trainer.recipe_book import find_recipe
from polyhead_trainer.reevaluate import measure, read_subject
from polyhead_trainer.run import run

INT8 = {"quantization": "int8"}
BFLOAT16 = {"quantization": "none", "dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    recipe: str
    trained_on: str
    seed: int
    own_loss: float
    """Held-out, on the backbone that it was trained on."""
    served_loss: float
    """Held-out, on int8."""


def main() -> None:
    options = _options()
    silence_peft()
    data = demo_data()
    facts = machine_facts()
    found: list[Measured] = []
    for recipe in options.recipes:
        for seed in range(options.seeds):
            for base in (INT8, BFLOAT16):
                found.append(_train(recipe, base, seed, options.steps, data))
                print(asdict(found[-1]), file=sys.stderr, flush=True)
    _print_table(found, options.recipes)
    write_results(options.out, facts, {"steps": options.steps, "seeds": options.seeds}, found)


def _train(recipe: str, base: dict[str, str], seed: int, steps: int, data: Path) -> Measured:
    values: dict[str, Any] = tomllib.loads(find_recipe(recipe).text)
    values["backbone"] = base
    values["training"].pop("epochs", None)
    values["training"] |= {"seed": seed, "max_steps": steps}
    values["evaluate"] |= {"max_examples": 0, "generate_examples": 0, "general_tokens": 512}
    values["evaluate"]["general_text"] = str(data / "general_text.txt")
    for side in ("train", "held_out"):
        values["data"][side] = [file.replace("data/", f"{data}/", 1) for file in values["data"][side]]
    with tempfile.TemporaryDirectory() as folder:
        values["output"] = f"{folder}/adapter"
        record = run(parse_config(values, recipe), Console(quiet=True)).record
        own = served = record.after.held_out_loss
        if base is not INT8:
            subject = read_subject(Path(values["output"]), ["backbone.quantization=int8", "backbone.dtype=auto"])
            served = measure(subject).after.held_out_loss
    return Measured(recipe=recipe, trained_on=_name(base), seed=seed, own_loss=own, served_loss=served)


def _name(base: dict[str, str]) -> str:
    return base.get("dtype", base["quantization"])


def _print_table(found: list[Measured], recipes: list[str]) -> None:
    print(f"{'recipe':<18} {'trained on':<10} {'loss there':>10} {'loss on int8':>12}   medians of the seeds")
    for recipe in recipes:
        for base in (INT8, BFLOAT16):
            own = [one for one in found if (one.recipe, one.trained_on) == (recipe, _name(base))]
            there = statistics.median(one.own_loss for one in own)
            served = statistics.median(one.served_loss for one in own)
            print(f"{recipe:<18} {_name(base):<10} {there:>10.4f} {served:>12.4f}")
        pairs = {one.seed: one.served_loss for one in found if one.recipe == recipe and one.trained_on == "int8"}
        others = [one for one in found if one.recipe == recipe and one.trained_on == "bfloat16"]
        better = sum(pairs[one.seed] < one.served_loss for one in others)
        print(f"{'':<18} trained on int8 is better with {better} of {len(others)} seeds")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["tweet_sentiment", "ui_spanish"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("results/training_int8.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
