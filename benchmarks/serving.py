"""Serving under load: throughput, time to first token and inter-token latency for 0, 1, 8 and 32 distinct adapters.

Starts a polyhead-server of its own with random LoRA adapters. Closed loop: --concurrency callers, each waiting for its
answer. Open loop: Poisson arrivals at --load-fraction of the closed loop's request rate without adapters. Then the
same 32 requests, one for each of 32 adapters, by the server and by peft + transformers in turn.
    python benchmarks/serving.py [--seed 0] [--repeats 2] [--out results/serving.json]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine_facts, say_if_busy, shown, silence_peft
from serving_load import ServerProcess, all_at_once, closed_loop, open_loop
from serving_peer import PeftPeer
from serving_workload import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    RANKS,
    TARGETS,
    ZIPF_EXPONENT,
    draw_asks,
    draw_batch,
    write_adapters,
)

from polyhead_core.backbone import resolve_source
from polyhead_core.paths import default_cache_dir

PEER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ADAPTER_POOL_BYTES = 1 << 30
"""All adapters stay resident: this benchmark is of serving, not of loading."""

Row = dict[str, Any]


def main() -> None:
    options = _options()
    silence_peft()
    machine = machine_facts()
    say_if_busy(machine)
    began_s = time.monotonic()
    backbone_directory = resolve_source(options.backbone, default_cache_dir())
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        names = write_adapters(Path(folder), backbone_directory, max(options.adapters), options.seed)
        arguments = ["--backbone", options.backbone, "--adapters", folder, "--quantization", options.quantization]
        settings = [f"adapter_pool_bytes={ADAPTER_POOL_BYTES}", *options.set]
        for setting in settings:
            arguments += ["--set", setting]
        with ServerProcess(arguments) as server:
            vocab_size = asyncio.run(_prepare(server.address, names))
            loads = _run_loads(server, names, vocab_size, options)
            peers = _run_peers(server, Path(folder), backbone_directory, names, vocab_size, options)
            facts = server.facts
    report = {
        "machine": machine,
        "server": facts,
        "settings": settings,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "workload": _workload_facts(options),
        "loads": loads,
        "load_summary": _summarise(loads, ("loop", "adapters")),
        "peers": peers,
        "peer_summary": _summarise(peers, ("system",)),
        "wall_s": time.monotonic() - began_s,
    }
    _print_report(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nwritten to {shown(options.out)} after {report['wall_s']:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--quantization", default="int8", choices=("int8", "none"))
    parser.add_argument("--set", action="append", default=[], help="further settings of the server, key=value")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32], help="numbers of distinct adapters")
    parser.add_argument("--requests", type=int, default=24, help="requests of one loop")
    parser.add_argument("--concurrency", type=int, default=16, help="callers of the closed loop")
    parser.add_argument("--load-fraction", type=float, default=0.6)
    parser.add_argument("--peer-dtypes", nargs="*", default=list(PEER_DTYPES), choices=tuple(PEER_DTYPES))
    parser.add_argument("--peer-output-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/serving.json"))
    return parser.parse_args()


async def _prepare(address: str, names: Sequence[str]) -> int:
    """Loads all adapters and answers once with each, so that nothing is first in what is measured."""
    from polyhead_client import AsyncClient

    async with AsyncClient(address) as client:
        info = await client.wait_until_ready()
        for name in names:
            await client.load(name)
        warm = [client.generate("The", adapter=name, max_tokens=4, ignore_eos=True) for name in (None, *names)]
        await asyncio.gather(*warm)
        return info.backbone.vocab_size


def _run_loads(server: ServerProcess, names: Sequence[str], vocab_size: int, options: argparse.Namespace) -> list[Row]:
    """Closed and open loop for each number of adapters; every other repeat in reverse order, against drift."""
    rows: list[Row] = []
    rate_per_s = 0.0
    for repeat in range(options.repeats):
        order = options.adapters if repeat % 2 == 0 else options.adapters[::-1]
        for num_adapters in order:
            rng = random.Random(f"{options.seed}/{repeat}/{num_adapters}")
            chosen = list(names[:num_adapters])
            asks = draw_asks(rng, options.requests, chosen, vocab_size)
            before = server.sample()
            seen = asyncio.run(closed_loop(server.address, asks, options.concurrency))
            shape: Row = {"adapters": num_adapters, "repeat": repeat}
            rows.append({"loop": "closed", **shape, **seen.summary(), **_batching(before, server.sample())})
            _say(rows[-1])
            # One offered load for all, so that their latencies can be compared.
            rate_per_s = rate_per_s or options.load_fraction * rows[0]["requests_per_s"]
            asks = draw_asks(rng, options.requests, chosen, vocab_size)
            before = server.sample()
            seen = asyncio.run(open_loop(server.address, asks, rate_per_s, rng))
            shape["offered_requests_per_s"] = rate_per_s
            rows.append({"loop": "open", **shape, **seen.summary(), **_batching(before, server.sample())})
            _say(rows[-1])
    return rows


def _say(row: Row) -> None:
    what = f"{row['loop']} loop, {row['adapters']} adapters" if "loop" in row else row["system"]
    print(f"repeat {row['repeat']}: {what}: {row['output_tokens_per_s']:.1f} tokens/s", file=sys.stderr)


def _batching(before: dict[str, float], after: dict[str, float]) -> Row:
    def mean(name: str) -> float:
        count = after[f"{name}_count"] - before[f"{name}_count"]
        return (after[f"{name}_sum"] - before[f"{name}_sum"]) / count if count else 0.0

    return {
        "mean_rows_per_step": mean("polyhead_batch_rows"),
        "mean_adapters_per_step": mean("polyhead_batch_distinct_adapters"),
    }


def _run_peers(
    server: ServerProcess,
    folder: Path,
    backbone_directory: Path,
    names: Sequence[str],
    vocab_size: int,
    options: argparse.Namespace,
) -> list[Row]:
    """Server and peers in turn, the same requests to all of them within one repeat."""
    peers = {dtype: PeftPeer(backbone_directory, folder, names, PEER_DTYPES[dtype]) for dtype in options.peer_dtypes}
    sample = draw_batch(random.Random(options.seed), list(names[:8]), vocab_size, 1)
    systems = {f"peft {dtype}, {peer.tune(sample)} threads": peer.generate for dtype, peer in peers.items()}
    rows: list[Row] = []
    for repeat in range(options.repeats):
        rng = random.Random(f"{options.seed}/peer/{repeat}")
        asks = draw_batch(rng, list(names), vocab_size, options.peer_output_tokens)
        answers = {}
        wall_s, answers["polyhead"] = asyncio.run(all_at_once(server.address, asks))
        timed = {"polyhead": wall_s}
        for system, generate in systems.items():
            timed[system], answers[system] = generate(asks)
        num_tokens = sum(ask.output_tokens for ask in asks)
        rows += [
            {
                "system": system,
                "repeat": repeat,
                "wall_s": wall_s,
                "output_tokens_per_s": num_tokens / wall_s,
                "speed_up_of_polyhead": wall_s / timed["polyhead"],
                "first_tokens_as_polyhead": _share_equal(answers[system], answers["polyhead"]),
            }
            for system, wall_s in timed.items()
        ]
        for row in rows[-len(timed) :]:
            _say(row)
    return rows


def _share_equal(answers: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]) -> float:
    """Of the requests, how many begin with the same token: evidence that both applied the same adapters."""
    return statistics.mean(float(a[0] == b[0]) for a, b in zip(answers, others, strict=True))


def _summarise(rows: Iterable[Row], keys: tuple[str, ...]) -> list[Row]:
    """Median, least and greatest of every figure over the repeats."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    summary = []
    for group, members in groups.items():
        figures = [name for name in members[0] if name not in (*keys, "repeat")]
        entry: Row = dict(zip(keys, group, strict=True))
        for name in figures:
            values = [member[name] for member in members]
            entry[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        summary.append(entry)
    return summary


def _workload_facts(options: argparse.Namespace) -> Row:
    return {
        "prompt_tokens": {"distribution": "log-normal, cut", **dataclasses.asdict(PROMPT_TOKENS)},
        "output_tokens": {"distribution": "log-normal, cut", **dataclasses.asdict(OUTPUT_TOKENS)},
        "adapter_popularity": f"Zipf, exponent {ZIPF_EXPONENT}",
        "arrivals": f"Poisson at {options.load_fraction} of the closed loop's request rate without adapters",
        "adapters": f"random LoRA of ranks {RANKS} in turn on {', '.join(TARGETS)}",
        "prompts": "random token ids: no shared prefixes",
        "peer_batch": f"one request per adapter, {options.peer_output_tokens} output tokens each",
    }


def _print_report(report: Row) -> None:
    machine = report["machine"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores; torch {machine['versions']['torch']}", end="")
    print(f"; commit {machine['commit'][:12]}{' with changes' if machine['uncommitted_changes'] else ''}")
    print("\n".join(report["server"]))
    print(f"medians of {report['options']['repeats']} repeats, [least, greatest] of throughput\n")
    header = ("loop", "adapters", "req/s", "out tok/s", "", "TTFT ms p50", "p95", "p99", "ITL ms p50", "p95", "p99")
    rows: list[Sequence[str]] = [(*header, "rows/step", "adapters/step")]
    for entry in report["load_summary"]:
        latencies = [
            f"{entry[f'{kind}_p{p}_s']['median'] * 1000:.0f}" for kind in ("ttft", "itl") for p in (50, 95, 99)
        ]
        batching = [f"{entry[name]['median']:.1f}" for name in ("mean_rows_per_step", "mean_adapters_per_step")]
        rate = f"{entry['requests_per_s']['median']:.2f}"
        rows.append((entry["loop"], str(entry["adapters"]), rate, *_spread(entry), *latencies, *batching))
    _print_table(rows)
    print("\nthe same requests, one for each adapter, sent together or generated as one batch\n")
    rows = [("system", "out tok/s", "", "Polyhead is faster by", "same first token")]
    for entry in report["peer_summary"]:
        ratio, same = entry["speed_up_of_polyhead"]["median"], entry["first_tokens_as_polyhead"]["median"]
        rows.append((entry["system"], *_spread(entry), f"{ratio:.2f} x", f"{same:.0%}"))
    _print_table(rows)


def _spread(entry: Row) -> tuple[str, str]:
    rate = entry["output_tokens_per_s"]
    return f"{rate['median']:.1f}", f"[{rate['min']:.1f}, {rate['max']:.1f}]"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
