"""The benchmark of a GPU's decode steps, tried out on the CPU with a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu_decode.py"


def test_all_parts_run_with_random_weights(tmp_path: Path) -> None:
    sizes = ["--rows", "1", "3", "--steps", "8", "--context", "16", "--repeats", "1", "--registered", "20"]
    command = [
        sys.executable, str(BENCHMARK), "--device", "cpu", "--shape", "tiny", "--array-gib", "0.01", *sizes,
        "--requests", "30", "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    seen = [(row["rows"], row["distinct_adapters"]) for row in report["steps"]]
    assert seen == [(1, 0), (1, 1), (3, 0), (3, 3)]
    assert all(0 < row["share_of_bandwidth_limit"] < 1 for row in report["steps"])
    assert len(report["cold"]["cold_s"]) == len(report["cold"]["warm_s"]) == 12
    assert report["zipf"]["ratio"] > 0
    assert report["peer"]["step_s"] > 0
    assert "3 adapters" in done.stdout
    assert "2 of 2 layers fused" in done.stdout
