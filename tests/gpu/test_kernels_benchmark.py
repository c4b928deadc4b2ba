"""The benchmark of the kernels: what it computes is drawn by the seed, and what it writes and prints. Not its times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not tested")

from kernel_cases import DEVICE
from polyhead_core.kernels.triton import tuning

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Timed:
    """In place of the device's clock: calls once, remembers the results, and has three seconds for each."""

    def __init__(self) -> None:
        self.results: list[object] = []

    def __call__(self, calls: Sequence[Callable[[], object]]) -> list[list[float]]:
        self.results += [call() for call in calls]
        return [[1.0, 3.0, 2.0] for _ in calls]


def test_a_run_repeats_by_its_seed_and_says_its_spread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module: Any = import_module("gpu_kernels")
    for name, value in {"HEADS": 2, "HEAD_WIDTH": 16, "RANK": 8}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tuning.TuningTable, "of", lambda _device: tuning.TuningTable(tmp_path / "table.json"))

    def run(seed: int) -> tuple[list[dict[str, Any]], list[object]]:
        monkeypatch.setattr(tuning, "sample_alternating", clock := Timed())
        measured = module.measure_rows(2, [(32, 64)], 20, seed, DEVICE)
        return measured, [one for one in clock.results if isinstance(one, torch.Tensor)]

    rows, results = run(0)
    kernels = {row["kernel"] for row in rows}
    assert {"W8A8 triton", "W8A8 _int_mm", "W8A16 triton", "triton paged", "triton pages"} <= kernels
    assert {(row["seconds"], row["seconds_min"], row["seconds_max"], row["runs"]) for row in rows} == {
        (2.0, 1.0, 3.0, 3)
    }
    again, other = run(0)[1], run(1)[1]
    assert all(torch.equal(one, two) for one, two in zip(results, again, strict=True))
    # Tuning draws from a seed of its own; the others are four products or more, two attentions and a gather.
    assert sum(not torch.equal(one, two) for one, two in zip(results, other, strict=True)) >= 7

    machine = {
        "device": "a device", "triton": "3", "versions": {"torch": "2"}, "commit": "0123456789abcdef", "cpu": "a",
        "cores": 2, "isa": [], "uncommitted_changes": False,
    }  # fmt: skip
    report = {"machine": machine, "options": {"seed": 0}, "results": rows}
    last = report | {"results": [row | {"seconds": 4e-6} for row in rows]}
    module.print_table(report, last)
    said = capsys.readouterr().out
    assert "[1000000.0, 3000000.0]" in said
    assert said.count(" 4.0\n") == len(rows)
    assert "last committed result" in said
    module.print_table(report, None)
    assert "nothing to compare with" in capsys.readouterr().out
