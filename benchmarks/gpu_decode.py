"""Decode with the shape of a large model, through the whole engine, on a CUDA device. Weights are random.

    python benchmarks/gpu_decode.py [--shape llama-2-7b] [--parts steps cold zipf peer] [--out results/gpu_decode.json]

steps: 1, 8 and 64 rows, without adapters and with a distinct rank-16 adapter on all linear layers each, against the
time that reading weights, KV and adapters once takes at the device's measured bandwidth. cold: first token of an
adapter that is in host memory, and of the same adapter again. zipf: a closed loop over 1,000 registered adapters, and
over one. peer: the same step by peft with adapter_names over bitsandbytes' int8. Beside each figure stands what the
last committed run measured. --device cpu only tries it all out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cost_bytes import adapter_bytes
from cost_load import mixed
from cost_report import print_table
from decode_steps import DecodeLoad, Row, add_bandwidth_limit, measure_decode
from gpu_kernels import require_device
from in_process import InProcessEngine, engine_with, load_adapter
from last_results import GPU_KIND, last_result, print_origin
from machine import machine_facts
from random_backbone import SHAPES, random_backbone, write_random_adapters
from serving_workload import TARGETS, draw_asks

PARTS = ("steps", "cold", "zipf", "peer")
COLD_ROUNDS = 12
ZIPF_TARGETS = ("q_proj", "v_proj")


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    if device.type == "cuda":
        require_device()
    machine = machine_facts() | {"device": _device_name(device)}
    last = last_result("gpu_decode", machine, GPU_KIND)
    report: Row = {"machine": machine, "options": _shown(options)}
    report["bytes_per_s"] = read_bandwidth(device, options.array_gib)
    print(f"{_device_name(device)}: {report['bytes_per_s'] / 1e9:,.0f} GB/s read")
    runs = {"steps": steps, "cold": cold, "zipf": zipf, "peer": peer}
    for part in options.parts:
        began_s = time.monotonic()
        report[part] = runs[part](options, device, report, (last or {}).get(part))
        print(f"({part}: {time.monotonic() - began_s:.0f} s)")
        _free(device)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")  # after each part: a later one may not end
    print_origin(last, machine)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--registered", type=int, default=1000, help="adapters of the zipf part, rank 8 on q and v")
    parser.add_argument("--requests", type=int, default=1000, help="of the zipf part")
    parser.add_argument("--array-gib", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_decode.json"))
    return parser.parse_args()


def _shown(options: argparse.Namespace) -> Row:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_bandwidth(device: torch.device, gib: float) -> float:
    """Bytes per second of a sum over random float32 numbers, the best of ten: what who only reads can have."""
    numbers = torch.rand(int(gib * 2**28), device=device)
    seconds = []
    for _ in range(10):
        _synchronize(device)
        began_s = time.perf_counter()
        numbers.sum()
        _synchronize(device)
        seconds.append(time.perf_counter() - began_s)
    return numbers.nbytes / min(seconds)


def _engine_settings(options: argparse.Namespace, **more: Any) -> Row:
    kv_gib = 32 if options.device == "cuda" else 0.125
    return {
        "device": options.device,
        "kv_cache_bytes": int(kv_gib * 2**30),
        "max_batch_rows": max(64, *options.rows),
        "max_batch_tokens": 4096,
        "max_adapter_rank": max(16, options.rank),
        **more,
    }


def _backbone(options: argparse.Namespace, device: torch.device) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_backbone(options.shape, device, dtype, options.seed)


def _room_for(count: int, per_adapter: int) -> int:
    """Bytes of a pool: its slabs waste up to a sixteenth, and of each size of extents the last one is not full."""
    return count * per_adapter * 17 // 16 + (8 << 20)


def steps(options: argparse.Namespace, device: torch.device, report: Row, last: list[Row] | None) -> list[Row]:
    backbone, most = _backbone(options, device), max(options.rows)
    load = DecodeLoad(context=options.context, steps=options.steps, repeats=options.repeats, seed=options.seed)
    found = []
    with tempfile.TemporaryDirectory(prefix="polyhead-gpu-") as folder:
        names = write_random_adapters(Path(folder), backbone, most, options.rank, seed=options.seed)
        pool = _room_for(most, adapter_bytes(backbone.model, options.rank, TARGETS))
        settings = _engine_settings(options, adapter_pool_bytes=pool, host_cache_bytes=2 * pool)
        with engine_with(Path(folder) / "adapters", loaded=backbone, **settings) as engine:
            print(f"{engine.engine.num_fused_layers} of {backbone.model.config.num_hidden_layers} layers fused")
            for name in names:
                load_adapter(engine.store, name)
            for rows in options.rows:
                for adapters in ([], names[:rows]):
                    row = measure_decode(engine, rows, adapters, load)
                    add_bandwidth_limit(row, report["bytes_per_s"])
                    found.append(row)
    before = {(row["rows"], row["distinct_adapters"]): f"{row['step_s'] * 1000:.2f}" for row in last or []}
    lines = [("rows", "adapters", "tok/s", "step ms", "forward ms", "limit ms", "of the limit", "last step ms")]
    for row in found:
        seconds = (row["step_s"], row["phase_s"]["forward"], row["bandwidth_limit_s"])
        cells = (str(row["rows"]), str(row["distinct_adapters"]), f"{row['tokens_per_s']:,.0f}")
        times = (f"{one * 1000:.2f}" for one in seconds)
        earlier = before.get((row["rows"], row["distinct_adapters"]), "")
        lines.append((*cells, *times, f"{row['share_of_bandwidth_limit']:.0%}", earlier))
    print_table(lines)
    return found


def cold(options: argparse.Namespace, device: torch.device, _: Row, last: Row | None) -> Row:
    """The pool holds half of the adapters, so that each one asked in turn has to come from host memory."""
    backbone, count = _backbone(options, device), 8
    with tempfile.TemporaryDirectory(prefix="polyhead-gpu-") as folder:
        names = write_random_adapters(Path(folder), backbone, count, options.rank, seed=options.seed)
        per_adapter = adapter_bytes(backbone.model, options.rank, TARGETS)
        pool = count // 2 * per_adapter
        settings = _engine_settings(options, adapter_pool_bytes=pool, host_cache_bytes=4 * pool)
        with engine_with(Path(folder) / "adapters", loaded=backbone, **settings) as engine:
            for name in names:
                load_adapter(engine.store, name)
            cold_s, warm_s = [], []
            for turn in range(COLD_ROUNDS + 1):
                first = _first_token_s(engine, names[turn % count], options, turn)
                again = _first_token_s(engine, names[turn % count], options, -turn - 1)
                if turn:
                    cold_s.append(first)
                    warm_s.append(again)
    result = {"cold_s": cold_s, "warm_s": warm_s, "adapter_bytes": per_adapter}
    difference = statistics.median(c - w for c, w in zip(cold_s, warm_s, strict=True))
    result["median_difference_s"] = difference
    print(
        f"first token: {statistics.median(cold_s) * 1000:.1f} ms cold, {statistics.median(warm_s) * 1000:.1f} ms warm, "
        f"difference {difference * 1000:.1f} ms (medians of {COLD_ROUNDS})"
        + (f"; last difference {last['median_difference_s'] * 1000:.1f} ms" if last else "")
    )
    return result


def _first_token_s(engine: InProcessEngine, name: str, options: argparse.Namespace, run: int) -> float:
    rng = random.Random(f"{options.seed}/{run}")
    prompt = [rng.randrange(256, engine.backbone.vocab_size) for _ in range(16)]
    began_s = time.monotonic()
    answer = engine.submit(prompt, adapter=name, max_tokens=1, ignore_eos=True)
    answer.result()
    assert answer.first_token_s is not None
    return answer.first_token_s - began_s


def zipf(options: argparse.Namespace, device: torch.device, _: Row, last: Row | None) -> Row:
    backbone = _backbone(options, device)
    with tempfile.TemporaryDirectory(prefix="polyhead-gpu-") as folder:
        names = write_random_adapters(Path(folder), backbone, options.registered, 8, ZIPF_TARGETS, seed=options.seed)
        # A quarter of them fits the device, all of them the host.
        per_adapter, resident = adapter_bytes(backbone.model, 8, ZIPF_TARGETS), max(65, options.registered // 4)
        settings = _engine_settings(
            options, adapter_pool_bytes=_room_for(resident, per_adapter), max_resident_adapters=resident,
            host_cache_bytes=options.registered * per_adapter,
        )  # fmt: skip
        tokens_per_s: dict[str, list[float]] = {"many": [], "one": []}
        with engine_with(Path(folder) / "adapters", loaded=backbone, **settings) as engine:
            for run in range(2 * options.repeats + 2):
                kind = "many" if run % 2 else "one"
                rng = random.Random(f"{options.seed}/{run}")
                asked = names if kind == "many" else names[:1]
                asks = draw_asks(rng, options.requests, asked, backbone.vocab_size)
                outcome = mixed(engine, asks, concurrency=64)
                if run >= 2:  # the first of each warms up
                    tokens_per_s[kind].append(outcome.tokens_per_s)
    medians = {kind: statistics.median(found) for kind, found in tokens_per_s.items()}
    print(
        f"{options.registered} adapters by Zipf: {medians['many']:,.0f} tokens/s; one adapter: {medians['one']:,.0f}; "
        f"ratio {medians['many'] / medians['one']:.2f}" + (f"; last ratio {last['ratio']:.2f}" if last else "")
    )
    return {"tokens_per_s": tokens_per_s, "ratio": medians["many"] / medians["one"]}


def peer(options: argparse.Namespace, device: torch.device, report: Row, last: Row | None) -> Row | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        print("peer: bitsandbytes is not installed: not measured")
        return None
    from gpu_peer import peft_step_seconds

    rows = max(options.rows)
    seconds = peft_step_seconds(SHAPES[options.shape], device, rows, options.rank, options.context, options.seed)
    ours = [row for row in report.get("steps", []) if row["rows"] == rows and row["distinct_adapters"] == rows]
    ratio = seconds / ours[0]["step_s"] if ours else None
    said = f"; Polyhead {ratio:.1f} times as fast" if ratio else ""
    if last and last["ratio"]:
        said += f", last {last['ratio']:.1f} times"
    print(f"peft + bitsandbytes int8, {rows} rows with {rows} adapters: {seconds * 1000:,.1f} ms a step{said}")
    return {"rows": rows, "step_s": seconds, "ratio": ratio}


if __name__ == "__main__":
    main()
