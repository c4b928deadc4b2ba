"""Decode steps of a running engine: what each takes, and how many bytes it has to read."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from in_process import InProcessEngine

from polyhead_core.backbone import Backbone
from polyhead_core.sites import SiteKind
from polyhead_server.metrics import StepFigures

Row = dict[str, Any]
_MAX_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class DecodeLoad:
    """What is decoded: `steps` tokens after prompts of `context`, `repeats` times; all drawn by `seed`."""

    context: int
    steps: int
    repeats: int
    seed: int


def weight_bytes(backbone: Backbone) -> int:
    """Of all linear layers, each read once: int8 with a float32 scale an output and an input, or in the float type."""
    linear = [site for site in backbone.sites if site.kind is SiteKind.LINEAR]
    if backbone.quantization == "none":
        return sum(site.in_features * site.out_features for site in linear) * backbone.dtype.itemsize
    return sum(site.in_features * site.out_features + 4 * (site.in_features + site.out_features) for site in linear)


def products(backbone: Backbone) -> int:
    """Multiplications with linear layers' weights for one row."""
    return sum(site.in_features * site.out_features for site in backbone.sites if site.kind is SiteKind.LINEAR)


def random_prompts(engine: InProcessEngine, rows: int, load: DecodeLoad, run: int) -> list[list[int]]:
    """Random tokens by the seed; no two share a prefix, so that every row has KV blocks of its own."""
    rng = random.Random(f"{load.seed}/{rows}/{run}")
    return [[rng.randrange(256, engine.backbone.vocab_size) for _ in range(load.context)] for _ in range(rows)]


def names_in_turn(names: Sequence[str], rows: int) -> list[str | None]:
    return [names[row % len(names)] if names else None for row in range(rows)]


def measure_decode(engine: InProcessEngine, rows: int, names: Sequence[str], load: DecodeLoad) -> Row:
    """Medians over steps that decode all `rows`, whose adapters are `names` in turn."""
    chosen = names_in_turn(names, rows)
    seen: list[StepFigures] = []
    repeats: list[float] = []
    for run in range(load.repeats + 1):
        full = _steps_of_all(engine, chosen, load, run)
        if run:  # the first one warms up
            seen += full
            repeats.append(statistics.median(step.seconds for step in full))
    phases = {name: statistics.median(step.phase_seconds[name] for step in seen) for name in seen[0].phase_seconds}
    tokens_in_cache = rows * (load.context + load.steps / 2)
    devices = {info.name: info.device_bytes for info in engine.store.list()}
    return {
        "rows": rows,
        "distinct_adapters": len(set(chosen) - {None}),
        "steps": len(seen),
        "step_s": statistics.median(step.seconds for step in seen),
        "step_s_by_repeat": repeats,
        "phase_s": phases,
        "weight_bytes": weight_bytes(engine.backbone),
        "kv_bytes": tokens_in_cache * engine.kv_bytes_per_token,
        "adapter_bytes": sum(devices[name] for name in set(chosen) if name is not None),
        "operations": 2 * rows * products(engine.backbone) if engine.backbone.quantization == "int8" else 0,
    }


def _steps_of_all(
    engine: InProcessEngine, chosen: Sequence[str | None], load: DecodeLoad, run: int
) -> list[StepFigures]:
    """The steps that decode all rows. Where steps are quick, the first row may end before the last one is there: then
    once more."""
    prompts = random_prompts(engine, len(chosen), load, run)
    for _ in range(_MAX_TRIES):
        before = len(engine.steps)
        answers = [
            engine.submit(prompt, adapter=name, max_tokens=load.steps + 4, ignore_eos=True)
            for prompt, name in zip(prompts, chosen, strict=True)
        ]
        for answer in answers:
            answer.result()
        while not engine.steps[before:] or engine.status.num_running:
            time.sleep(0.01)  # the last step is booked after its answers have gone out
        full = [step for step in engine.steps[before:] if step.rows == step.decode_tokens == len(chosen)]
        if full:
            return full
    raise SystemExit(f"no step decoded {len(chosen)} rows together: raise --steps, or max_batch_tokens by --set")


def add_bandwidth_limit(row: Row, bytes_per_s: float) -> None:
    row["bandwidth_limit_s"] = (row["weight_bytes"] + row["kv_bytes"] + row["adapter_bytes"]) / bytes_per_s
    row["share_of_bandwidth_limit"] = row["bandwidth_limit_s"] / row["step_s"]
    row["tokens_per_s"] = row["rows"] / row["step_s"]
