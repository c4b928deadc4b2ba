"""How near a decode step is to what this machine can do: its measured read bandwidth and int8 rate, and each phase of
the engine's step (schedule, prepare, forward, sample, deliver) beside them.

The limit of a step is the longer of two times: int8 weights, KV and adapters read once at the measured bandwidth, and
the integer products at the processor's own rate. --profile adds where the time goes, kernel by kernel.
    python benchmarks/roofline.py [--rows 1 8 32] [--adapters 0] [--profile] [--out results/roofline.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cost_adapters import AdapterWriter, adapter_name
from cost_report import print_table
from decode_steps import (
    DecodeLoad,
    Row,
    add_bandwidth_limit,
    measure_decode,
    names_in_turn,
    products,
    random_prompts,
    weight_bytes,
)
from in_process import InProcessEngine, engine_with, load_adapter
from machine import machine_facts, say_if_busy
from roofline_probe import all_cores, int8_rate, read_bandwidth
from roofline_profile import StepProfile, profile_decode
from serving_workload import RANKS

from polyhead_core.backbone import Backbone, resolve_source
from polyhead_core.paths import default_cache_dir
from polyhead_server.config import load_config

_SHOWN_KERNELS = 25


def main() -> None:
    options = _options()
    machine = machine_facts()
    say_if_busy(machine)
    config = load_config(None, options.set, backbone=options.backbone)
    num_threads = config.num_threads or all_cores()
    bandwidth = read_bandwidth(int(options.array_gib * (1 << 30)), num_threads, options.passes)
    rate = int8_rate(num_threads, options.passes)
    with tempfile.TemporaryDirectory(prefix="polyhead-roofline-") as folder:
        names = _write_adapters(Path(folder), options)
        settings = {key: getattr(config, key) for key in (text.partition("=")[0].strip() for text in options.set)}
        settings |= {"backbone": options.backbone, "max_batch_rows": max(64, *options.rows)}
        with engine_with(Path(folder) / "adapters", **settings) as engine:
            for name in names:
                load_adapter(engine.store, name)
            rows = [measure_decode(engine, count, names, _load(options)) for count in options.rows]
            profiles = [_profile(engine, count, names, options) for count in options.rows] if options.profile else []
            backbone = _backbone_facts(engine.backbone)
    for row in rows:
        _add_limits(row, bandwidth.bytes_per_s, rate.in_registers)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = {
        "machine": machine,
        "options": shown,
        "backbone": backbone,
        "bandwidth": dataclasses.asdict(bandwidth),
        "int8": dataclasses.asdict(rate),
        "rows": rows,
        "profiles": [dataclasses.asdict(one) for one in profiles],
    }
    _print_report(report, profiles)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, default=0, help="distinct adapters among the rows, in turn; 0: none")
    parser.add_argument("--ranks", type=int, nargs="+", default=[RANKS[-1]], help="of the adapters, in turn")
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="settings of the engine, key=value")
    parser.add_argument("--array-gib", type=float, default=1.0, help="array for the bandwidth; far beyond the caches")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/roofline.json"))
    return parser.parse_args()


def _write_adapters(folder: Path, options: argparse.Namespace) -> list[str]:
    adapters = folder / "adapters"
    adapters.mkdir()
    if options.adapters:
        directory = resolve_source(options.backbone, default_cache_dir())
        writer = AdapterWriter(directory, folder / "templates", options.ranks, options.seed)
        for number in range(options.adapters):
            writer.write(adapters / adapter_name(number), number)
    return [adapter_name(number) for number in range(options.adapters)]


def _backbone_facts(backbone: Backbone) -> Row:
    return {
        "source": backbone.source,
        "architecture": backbone.architecture,
        "parameters": backbone.num_parameters,
        "quantization": backbone.quantization,
        "bytes": backbone.num_bytes,
        "weight_bytes_read_per_step": weight_bytes(backbone),
        "products_per_row": products(backbone),
    }


def _load(options: argparse.Namespace) -> DecodeLoad:
    return DecodeLoad(context=options.context, steps=options.steps, repeats=options.repeats, seed=options.seed)


def _profile(engine: InProcessEngine, rows: int, names: Sequence[str], options: argparse.Namespace) -> StepProfile:
    prompts = random_prompts(engine, rows, _load(options), run=-1)
    return profile_decode(engine, prompts, names_in_turn(names, rows), options.profile_steps)


def _add_limits(row: Row, bytes_per_s: float, operations_per_s: float) -> None:
    add_bandwidth_limit(row, bytes_per_s)
    row["int8_limit_s"] = row["operations"] / operations_per_s
    row["limit_s"] = max(row["bandwidth_limit_s"], row["int8_limit_s"])
    row["share_of_limit"] = row["limit_s"] / row["step_s"]


def _print_report(report: Row, profiles: Sequence[StepProfile]) -> None:
    machine, backbone, bandwidth = report["machine"], report["backbone"], report["bandwidth"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores; torch {machine['versions']['torch']}", end="")
    print(f"; commit {machine['commit'][:12]}{' with changes' if machine['uncommitted_changes'] else ''}")
    print(
        f"memory: {bandwidth['bytes_per_s'] / 1e9:.1f} GB/s read by {bandwidth['num_threads']} threads, median of "
        f"{bandwidth['passes']} passes over {bandwidth['array_bytes'] / 2**30:.2f} GiB "
        f"(best {bandwidth['best_bytes_per_s'] / 1e9:.1f})"
    )
    int8 = report["int8"]
    shapes = ", ".join(f"{shape}: {rate / 1e9:.1f}" for shape, rate in int8["torch_int_mm"].items())
    print(
        f"int8: {int8['in_registers'] / 1e9:.0f} G operations/s in registers ({int8['instruction']}), the limit below; "
        f"torch._int_mm reaches {shapes}"
    )
    print(
        f"backbone {backbone['source']} ({backbone['architecture']}, {backbone['quantization']}): "
        f"{backbone['weight_bytes_read_per_step'] / 1e6:.1f} MB of linear layers, read once a step"
    )
    print("\ndecode steps, medians in ms\n")
    _print_steps(report["rows"])
    for one in profiles:
        _print_profile(one)


def _print_steps(rows: Sequence[Row]) -> None:
    names = list(rows[0]["phase_s"])
    limits = ("bandwidth limit", "int8 limit", "of bandwidth", "of the higher limit")
    lines: list[tuple[str, ...]] = [("rows", "adapters", "tok/s", "step", *names, *limits)]
    for row in rows:
        phases = [f"{row['phase_s'][name] * 1000:.2f}" for name in names]
        limits_ms = [f"{row[name] * 1000:.2f}" for name in ("bandwidth_limit_s", "int8_limit_s")]
        shares = (f"{row['share_of_bandwidth_limit']:.0%}", f"{row['share_of_limit']:.0%}")
        head = (str(row["rows"]), str(row["distinct_adapters"]), f"{row['tokens_per_s']:.1f}")
        lines.append((*head, f"{row['step_s'] * 1000:.2f}", *phases, *limits_ms, *shares))
    print_table(lines)
    print("\nthe same as multiples of the higher limit\n")
    lines = [("rows", "adapters", "step", *names)]
    for row in rows:
        times = [row["step_s"], *(row["phase_s"][name] for name in names)]
        lines.append(
            (str(row["rows"]), str(row["distinct_adapters"]), *(f"{one / row['limit_s']:.2f}" for one in times))
        )
    print_table(lines)


def _print_profile(one: StepProfile) -> None:
    print(f"\nwhere a step of {one.rows} rows goes: {one.step_s * 1000:.2f} ms under the profiler, {one.steps} steps\n")
    lines = [("kernel", "calls", "ms", "share")]
    for kernel in one.kernels[:_SHOWN_KERNELS]:
        cells = (f"{kernel.calls_per_step:.0f}", f"{kernel.self_s_per_step * 1000:.3f}", f"{kernel.share:.1%}")
        lines.append((kernel.name, *cells))
    rest = one.kernels[_SHOWN_KERNELS:]
    if rest:
        seconds = sum(kernel.self_s_per_step for kernel in rest)
        calls = sum(kernel.calls_per_step for kernel in rest)
        lines.append((f"{len(rest)} others", f"{calls:.0f}", f"{seconds * 1000:.3f}", f"{seconds / one.step_s:.1%}"))
    lines.append(("outside operators", "", f"{one.outside_s * 1000:.3f}", f"{one.outside_s / one.step_s:.1%}"))
    for name, seconds in one.layer_phases.items():
        lines.append((f"in the layers: {name}", "", f"{seconds * 1000:.3f}", f"{seconds / one.step_s:.1%}"))
    print_table(lines)


if __name__ == "__main__":
    main()
