"""What the committed result of an earlier run said, to be shown beside a new one, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LAST_RESULTS = Path(__file__).parent / "results"
"""Each on the machine that it names: BENCHMARK.json or BENCHMARK_*.json."""
CPU_KIND = ("isa",)
"""What makes two machines alike for a benchmark on the CPU ..."""
GPU_KIND = ("device",)
"""... and on a GPU."""
_SAME = ("cpu", "isa", "cores", "device")


def last_result(benchmark: str, machine: Row, kind: Sequence[str] = CPU_KIND) -> Row | None:
    """Of the committed results that of this very processor, else of the same `kind`, else any; None: there is none.

    To be asked for before anything is written: --out may name the very same file.
    """
    files = [*LAST_RESULTS.glob(f"{benchmark}.json"), *sorted(LAST_RESULTS.glob(f"{benchmark}_*.json"))]
    results: list[Row] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return max(results, key=lambda one: _alike(one, machine, kind) + _alike(one, machine, _SAME), default=None)


def print_origin(last: Row | None, machine: Row) -> None:
    if last is None:
        print("\nno result of this benchmark is committed yet: nothing to compare with")
        return
    there = last["machine"]
    name = there.get("device") or there["cpu"]
    same = _alike(last, machine, _SAME)
    where = "this kind of machine" if same else f"another machine ({name}, {there['cores']} cores)"
    print(f"\nlast committed result: commit {there['commit'][:12]}, seed {last['options']['seed']}, {where}")


def _alike(result: Row, machine: Row, facts: Sequence[str]) -> bool:
    return all(result["machine"].get(fact) == machine.get(fact) for fact in facts)
