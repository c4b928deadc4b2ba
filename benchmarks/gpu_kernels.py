"""Each kernel on a CUDA device against its peers: alternating runs, medians and spread, rate of the bytes it must move.

    python benchmarks/gpu_kernels.py [--rows 1,8,64] [--shapes 4096x4096,...] [--seed 0] [--out gpu_kernels.json]

Products: W8A8 and W8A16 in Triton, torch._int_mm with Triton around it, cuBLAS on a bfloat16 weight, and bitsandbytes'
int8_linear_matmul where it can be imported. The default shapes are Llama-2-7B's. What they compute with is drawn by the
seed, for each case anew. Beside it stands what the last committed run measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from last_results import GPU_KIND, last_result, print_origin
from machine import machine_facts, say_if_busy

from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables

Call = Callable[[], object]
Row = dict[str, Any]
SHAPES = "12288x4096,4096x4096,22016x4096,4096x11008"
HEADS, HEAD_WIDTH, BLOCK = 32, 128, 16
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64", help="rows of a step, with commas")
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN of the products, with commas")
    parser.add_argument("--context", type=int, default=1024, help="keys that each row attends to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_kernels.json"))
    options = parser.parse_args()
    require_device()
    rows = [int(text) for text in options.rows.split(",")]
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes.split(",")]
    machine = machine_facts() | {"device": torch.cuda.get_device_name(), "triton": metadata.version("triton")}
    say_if_busy(machine)
    last = last_result("gpu_kernels", machine, GPU_KIND)
    device = torch.device("cuda")
    results = [row for count in rows for row in measure_rows(count, shapes, options.context, options.seed, device)]
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = {"machine": machine, "options": shown, "results": results}
    print_table(report, last)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def require_device() -> None:
    if not torch.cuda.is_available():
        sys.exit(f"bench-gpu needs a CUDA device; torch {torch.__version__} on {platform.node()} finds none")
    if importlib.util.find_spec("triton") is None:
        sys.exit("bench-gpu needs triton, which CUDA builds of torch bring: pip install triton")


def measure_rows(rows: int, shapes: list[tuple[int, ...]], context: int, seed: int, device: torch.device) -> list[Row]:
    def draws() -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    measured = []
    for outputs, width in shapes:
        calls, tiles = products(rows, outputs, width, draws())
        measured += timed(f"int8 {outputs}x{width}", rows, width * outputs, calls, tiles)
    width = shapes[0][1]
    kv_bytes = rows * context * 2 * HEADS * HEAD_WIDTH * 2
    adapter_bytes = rows * RANK * 2 * width * 2
    return [
        *measured,
        *timed("norm + quantise", rows, rows * width * 3, norms(rows, width, draws())),
        *timed(f"attention, {context} keys", rows, kv_bytes, attentions(rows, context, draws())),
        *timed(f"{rows} adapters, rank {RANK}", rows, adapter_bytes, adapter_products(rows, width, draws())),
    ]


def timed(
    case: str, rows: int, num_bytes: int, calls: dict[str, Call], tiles: dict[str, str] | None = None
) -> list[Row]:
    """One entry for each call: seconds and their spread, its tile if any, bytes (weights or KV) that it must move."""
    from polyhead_core.kernels.triton.tuning import sample_alternating

    samples = sample_alternating(list(calls.values()))
    return [
        {
            "case": case,
            "rows": rows,
            "kernel": name,
            "tile": (tiles or {}).get(name),
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "runs": len(seconds),
            "bytes": num_bytes,
        }
        for name, seconds in zip(calls, samples, strict=True)
        if seconds
    ]


def products(rows: int, outputs: int, width: int, generator: torch.Generator) -> tuple[dict[str, Call], dict[str, str]]:
    """The fastest of each family with its tile, and the peers. W8A8 products' time holds quantising the rows."""
    from polyhead_core.kernels.triton import int8_linear, quantize, tuning

    device = generator.device
    x = normal(generator, rows, width)
    weight = torch.randint(-127, 128, (outputs, width), device=device, dtype=torch.int8, generator=generator)
    absmax = torch.rand(outputs, device=device, generator=generator) + 0.5
    dense = weight.bfloat16()
    key = tuning.ShapeKey(rows=rows, width=width, outputs=outputs, outliers=0)
    table = tuning.TuningTable.of(device)
    table.measure(key, tuning.w8a8_candidates(key, device) + tuning.float_candidates(key, device))
    tiles = {tile.name: tile for tile in (*tuning.W8A8_TILES, *tuning.W8A16_TILES)}
    best = min(
        (seconds, name) for name, seconds in table.seconds(key)["w8a8"].items() if name != "cublas"
    )[1]  # fmt: skip
    weight_only = tiles[table.fastest(key, "w8a16")]

    def by_cublas() -> torch.Tensor:
        return int8_linear.int8_product_cublas(quantize.quantize_rows(x), weight, absmax)

    calls: dict[str, Call] = {
        "W8A8 triton": partial(int8_linear.int8_linear, x, weight, absmax, tile=tiles[best]),
        "W8A8 _int_mm": by_cublas,
        "W8A16 triton": partial(int8_linear.int8_linear_weight_only, x, weight, absmax, tile=weight_only),
        "bf16 cuBLAS": partial(torch.nn.functional.linear, x, dense),
    }
    return calls | bitsandbytes_product(x, weight), {"W8A8 triton": best, "W8A16 triton": weight_only.name}


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=generator.device, dtype=torch.bfloat16, generator=generator)


def bitsandbytes_product(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """Its int8 product, the rows' quantisation included, the scales not; empty where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes.functional as peer

    half = x.half()

    def product() -> torch.Tensor:
        quantized, _, _ = peer.int8_vectorwise_quant(half)
        result: torch.Tensor = peer.int8_linear_matmul(quantized, weight)
        return result

    return {f"bitsandbytes {metadata.version('bitsandbytes')}": product}


def norms(rows: int, width: int, generator: torch.Generator) -> dict[str, Call]:
    from polyhead_core.kernels import reference
    from polyhead_core.kernels.triton import quantize

    x, weight = normal(generator, rows, width), torch.ones(width, device=generator.device)
    return {
        "triton": partial(quantize.rms_norm_quantize, x, weight, 1e-5),
        "torch": lambda: reference.quantize_rows(reference.rms_norm(x, weight, 1e-5)),
    }


def attentions(rows: int, context: int, generator: torch.Generator) -> dict[str, Call]:
    """One decode token of each sequence; the peer reads keys and values that lie in one piece."""
    from polyhead_core.kernels.triton.attention import paged_attention

    blocks, device = -(-context // BLOCK), generator.device
    q = normal(generator, rows, HEADS, HEAD_WIDTH)
    k, v = (normal(generator, rows * blocks, HEADS, BLOCK, HEAD_WIDTH) for _ in range(2))
    tables = torch.randperm(rows * blocks, device=device, generator=generator).to(torch.int32).view(rows, blocks)
    sequence = torch.arange(rows, device=device, dtype=torch.int32)
    positions = torch.full((rows,), context - 1, device=device)
    whole_k, whole_v = (
        pages.view(rows, blocks, HEADS, BLOCK, HEAD_WIDTH).transpose(1, 2).flatten(2, 3) for pages in (k, v)
    )
    whole_k, whole_v = whole_k[:, :, :context], whole_v[:, :, :context]
    scaled = torch.nn.functional.scaled_dot_product_attention
    return {
        "triton paged": partial(paged_attention, q, k, v, tables, sequence, positions, HEAD_WIDTH**-0.5),
        "torch sdpa, contiguous": partial(scaled, q.unsqueeze(2), whole_k, whole_v),
    }


def adapter_products(rows: int, width: int, generator: torch.Generator) -> dict[str, Call]:
    """Every row has an adapter of its own; the peer gathers one pair of matrices per row, ready stacked."""
    from polyhead_core.kernels.triton.low_rank import low_rank_add

    pages_per_adapter, units, device = RANK // RANKS_PER_PAGE, RANKS_PER_PAGE * width // UNIT, generator.device
    starts = torch.arange(rows * pages_per_adapter * 2, device=device, dtype=torch.int32) * units
    tables = AdapterTables(
        arena=normal(generator, len(starts) * units * UNIT),
        num_pages=torch.full((rows, 1), pages_per_adapter, device=device, dtype=torch.int32),
        pages=starts.view(rows, 1, pages_per_adapter, 2),
        bias=torch.full((rows, 1), -1, device=device, dtype=torch.int32),
        acts=torch.ones(rows, 1, dtype=torch.bool),
    )
    x, y = normal(generator, rows, width), torch.zeros(rows, width, device=device, dtype=torch.bfloat16)
    slots = torch.arange(rows, device=device, dtype=torch.int32)  # sorted, as a step's rows are
    stacked_a, stacked_b = (normal(generator, rows, RANK, width) for _ in range(2))

    def gathered() -> torch.Tensor:
        low = torch.bmm(stacked_a[slots], x.unsqueeze(2))
        return torch.bmm(low.transpose(1, 2), stacked_b[slots])

    return {"triton pages": partial(low_rank_add, y, x, tables, 0, slots), "torch gather + bmm": gathered}


def print_table(report: Row, last: Row | None) -> None:
    machine = report["machine"]
    before = {(row["case"], row["rows"], row["kernel"]): row["seconds"] for row in last["results"]} if last else {}
    state = " with changes" if machine["uncommitted_changes"] else ""
    print(f"\n{machine['device']}; torch {machine['versions']['torch']}, triton {machine['triton']}", end="; ")
    print(f"commit {machine['commit'][:12]}{state}; seed {report['options']['seed']}; medians of alternating runs")
    print(f"{'case':26} {'rows':>5}  {'kernel':44} {'microseconds':>12} {'':>20} {'GB/s':>8} {'last':>12}")
    for row in report["results"]:
        low, high = row["seconds_min"] * 1e6, row["seconds_max"] * 1e6
        earlier = before.get((row["case"], row["rows"], row["kernel"]))
        name = f"{row['kernel']} {row['tile'] or ''}"
        print(
            f"{row['case']:26} {row['rows']:5d}  {name:44} {row['seconds'] * 1e6:12.1f} "
            f"{f'[{low:.1f}, {high:.1f}]':>20} {row['bytes'] / row['seconds'] / 1e9:8.0f} "
            f"{f'{earlier * 1e6:.1f}' if earlier else '':>12}"
        )
    print_origin(last, machine)


if __name__ == "__main__":
    main()
