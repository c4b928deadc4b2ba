"""What N fine-tunes of one backbone cost to serve: N dedicated merged models, one model swapped between merged
adapters, or Polyhead. Memory, throughput, time from publication to first token, bytes per extra tenant, money.

All three run in the same engine with the same int8 kernels, on the same asks: a closed loop whose requests name
fine-tunes by Zipf popularity. Every row says whether it was measured or what it was computed from.
    python benchmarks/deployment_cost.py [--fine-tunes 1 4 16 64 256 1000] [--price-per-hour 1.0] [--seed 0]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cost_adapters import AdapterWriter, adapter_name, file_bytes
from cost_bytes import LLAMA_2_7B, shape_bytes
from cost_merge import Merger, time_cold_load, time_merge
from cost_publish import publish_repeatedly
from cost_report import print_report
from cost_systems import Row, Swap, Systems, same_first_tokens
from cost_table import Machine, cost
from last_results import last_result
from machine import machine_facts, say_if_busy
from serving_workload import OUTPUT_TOKENS, PROMPT_TOKENS, RANKS, TARGETS, ZIPF_EXPONENT

from polyhead_server.config import load_config

GIB = 1 << 30


def main() -> None:
    options = _options()
    if find_spec("matplotlib") is None:
        raise SystemExit("the plots need matplotlib: pip install -c constraints.txt 'polyhead[bench]'")
    machine = machine_facts()
    say_if_busy(machine)
    last = last_result("deployment_cost", machine)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polyhead-cost-", dir=options.scratch) as folder:
        report = _measure(options, machine, Path(folder))
    report["wall_s"] = time.monotonic() - began_s
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report, last)
    from cost_plots import write_plots

    files = write_plots(report, options.out)
    print(f"\nwritten to {options.out}, {', '.join(file.name for file in files)} after {report['wall_s']:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--fine-tunes", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1000])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="ranks of the adapters, in turn")
    parser.add_argument("--requests", type=int, default=64, help="requests of one loop")
    parser.add_argument("--concurrency", type=int, default=32, help="callers of the closed loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--publications", type=int, default=7)
    parser.add_argument("--set", action="append", default=[], help="further settings of all engines, key=value")
    parser.add_argument("--max-dedicated", type=int, default=16, help="most merged models held at once")
    parser.add_argument("--memory-gib", type=float, help="what they may take together; default: half of this machine's")
    parser.add_argument("--price-per-hour", type=float, default=1.0, help="of one machine like this one, any currency")
    parser.add_argument("--price-per-gpu-hour", type=float, default=2.0, help="of one GPU, for the projection to 7B")
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of that GPU")
    parser.add_argument("--usable", type=float, default=0.8, help="part of a memory for weights and adapters")
    parser.add_argument(
        "--demand",
        type=float,
        help="tokens per second to serve; default: one machine's with Polyhead, in its slowest loop",
    )
    parser.add_argument("--scratch", type=Path, help="where adapters are written (6 MB each); default: the system's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/deployment_cost.json"))
    options = parser.parse_args()
    options.fine_tunes = sorted(set(options.fine_tunes))
    return options


def _measure(options: argparse.Namespace, machine: dict[str, Any], folder: Path) -> Row:
    adapters, staging = folder / "adapters", folder / "staging"
    adapters.mkdir()
    staging.mkdir()
    config = load_config(None, options.set, backbone=options.backbone)
    settings = {key: getattr(config, key) for key in (text.partition("=")[0].strip() for text in options.set)}
    _say("loading the backbone")
    merger = Merger(options.backbone)
    writer = AdapterWriter(merger.int8.directory, folder / "templates", options.ranks, options.seed)
    systems = Systems(
        merger=merger,
        adapters=adapters,
        settings={"backbone": options.backbone, **settings},
        requests=options.requests,
        concurrency=options.concurrency,
        repeats=options.repeats,
        seed=options.seed,
        memory_limit_bytes=int(options.memory_gib * GIB) if options.memory_gib else machine["memory_bytes"] // 2,
        max_dedicated=options.max_dedicated,
    )
    swaps = _measure_swaps(merger, writer, folder, options.publications)
    best = min(swaps, key=lambda swap: swap.seconds)
    rows: list[Row] = []
    publications: list[Row] = []
    for fine_tunes in options.fine_tunes:
        _say(f"{fine_tunes} fine-tunes")
        for number in range(len(list(adapters.iterdir())), fine_tunes):
            writer.write(adapters / adapter_name(number), number)
        rows += _rows(systems, fine_tunes, best)
        if fine_tunes in (options.fine_tunes[0], options.fine_tunes[-1]):
            _say(f"publishing beside {fine_tunes} adapters")
            first = 1_000_000 + 1000 * len(publications)
            count = options.publications
            publications.append(
                publish_repeatedly(options.backbone, adapters, writer, staging, first, count, options.set)
            )
    per_tenant = _bytes_per_tenant(rows, merger, best)
    computer = Machine(
        price_per_hour=options.price_per_hour, memory_bytes=machine["memory_bytes"], usable=options.usable
    )
    _add_costs(rows, computer, options.demand)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "machine": machine,
        "options": shown,
        "workload": _workload_facts(options),
        "backbone": {
            "architecture": merger.int8.architecture,
            "parameters": merger.int8.num_parameters,
            "bytes_int8": merger.int8.num_bytes,
            "bytes_bf16": merger.bytes_bf16_model,
        },
        "swaps": [dataclasses.asdict(swap) for swap in swaps],
        "rows": rows,
        "bytes_per_extra_tenant": per_tenant,
        "publications": publications,
        "projection": _projection(options, merger),
    }


def _measure_swaps(merger: Merger, writer: AdapterWriter, folder: Path, times: int) -> list[Swap]:
    _say("timing swaps")
    scratch = folder / "swaps"
    names = [scratch / str(number) for number in range(times + 1)]
    for number, name in enumerate(names):
        writer.write(name, number)
    model = merger.dedicated(names[0])
    merging = statistics.median(time_merge(merger, model, names[1:]))
    merged_file = scratch / "merged.safetensors"
    loading = statistics.median(time_cold_load(model, merged_file, times))
    adapter_bytes = round(statistics.mean(file_bytes(name) for name in names))
    return [
        Swap(
            method="merging the adapter into kept bfloat16 weights and quantising again",
            seconds=merging,
            extra_memory_bytes=merger.kept_bytes,
            disk_bytes_per_fine_tune=adapter_bytes,
        ),
        Swap(
            method="reading the layers merged beforehand from disk",
            seconds=loading,
            extra_memory_bytes=0,
            disk_bytes_per_fine_tune=merged_file.stat().st_size,
        ),
    ]


def _rows(systems: Systems, fine_tunes: int, swap: Swap) -> list[Row]:
    polyhead, mixed_outcomes = systems.polyhead(fine_tunes)
    dedicated, turns = systems.dedicated_models(fine_tunes)
    rows = [
        {"fine_tunes": fine_tunes, "system": "dedicated", **dedicated},
        {"fine_tunes": fine_tunes, "system": "swapped", **systems.swapped(fine_tunes, turns, swap)},
        {"fine_tunes": fine_tunes, "system": "polyhead", **polyhead},
    ]
    if dedicated["basis"].startswith("measured"):
        # Merged weights are quantised after the sum and adapters apply to quantised ones: near ties can differ.
        rows[0]["first_tokens_as_polyhead"] = same_first_tokens(turns, mixed_outcomes)
    return rows


def _bytes_per_tenant(rows: list[Row], merger: Merger, swap: Swap) -> Row:
    polyhead = [row for row in rows if row["system"] == "polyhead"]
    return {
        "dedicated": {"memory": merger.int8.num_bytes, "basis": "measured: the weights of one merged int8 model"},
        "dedicated_bf16": {"memory": merger.bytes_bf16_model, "basis": "measured: the same model in bfloat16"},
        "swapped": {"memory": 0, "disk": swap.disk_bytes_per_fine_tune, "basis": f"measured: {swap.method}"},
        "polyhead": {
            "memory": polyhead[-1]["device_bytes_per_adapter"],
            "disk": polyhead[-1]["file_bytes_per_adapter"],
            "basis": "measured: mean bytes of an adapter in the device pool; as much again for its host copy",
        },
    }


def _add_costs(rows: list[Row], machine: Machine, demand: float | None) -> None:
    one_machine = {row["fine_tunes"]: row["output_tokens_per_s_min"] for row in rows if row["system"] == "polyhead"}
    for row in rows:
        wanted = demand if demand is not None else one_machine[row["fine_tunes"]]
        row["demand_tokens_per_s"] = wanted
        found = cost(machine, row["fine_tunes"], row["memory_bytes"], wanted, row["output_tokens_per_s"])
        row["cost"] = dataclasses.asdict(found)
        row["cost_per_million_tokens"] = found.machines * machine.price_per_hour / (wanted * 3600 / 1e6)


def _projection(options: argparse.Namespace, merger: Merger) -> Row:
    gpu = Machine(
        price_per_hour=options.price_per_gpu_hour, memory_bytes=int(options.gpu_gib * GIB), usable=options.usable
    )
    ours, seven = shape_bytes(merger.int8.model.config), shape_bytes(LLAMA_2_7B)
    rows = []
    for fine_tunes in options.fine_tunes:
        kinds = {"dedicated, bf16": fine_tunes * seven.bf16, "dedicated, int8": fine_tunes * seven.int8}
        kinds |= {f"Polyhead, {name}": seven.int8 + fine_tunes * size for name, size in seven.adapters.items()}
        rows += [
            {
                "fine_tunes": fine_tunes,
                "system": name,
                "memory_bytes": size,
                "cost": dataclasses.asdict(cost(gpu, fine_tunes, size)),
                "basis": "computed from byte counts",
            }
            for name, size in kinds.items()
        ]
    return {
        "shapes": {"this backbone": dataclasses.asdict(ours), "Llama-2-7B": dataclasses.asdict(seven)},
        "counted_int8_bytes_of_this_backbone": ours.int8,
        "measured_int8_bytes_of_this_backbone": merger.int8.num_bytes,
        "rows": rows,
    }


def _workload_facts(options: argparse.Namespace) -> Row:
    return {
        "fine_tunes": f"LoRA of ranks {options.ranks} in turn on {', '.join(TARGETS)}, random weights by seed",
        "popularity": f"Zipf, exponent {ZIPF_EXPONENT}",
        "loop": f"closed, {options.concurrency} callers, {options.requests} requests",
        "prompt_tokens": dataclasses.asdict(PROMPT_TOKENS),
        "output_tokens": dataclasses.asdict(OUTPUT_TOKENS),
        "dedicated": "int8 merged models in Polyhead's own engine, resident, one running at a time, all cores to it",
        "not_counted": "what is allocated of the adapter pool and not used; KV cache, code and buffers: alike for all "
        "systems per running sequence, though each dedicated model would need a KV cache of its own; for swapped "
        "models the engine's own preparation after a swap",
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
