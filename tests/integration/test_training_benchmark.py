"""The benchmark of training, with random weights of a tiny shape: every system that is installed runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "training.py"
SYSTEMS = [
    "polyhead int8", "polyhead float32", "polyhead bfloat16", "transformers Trainer float32",
    "llama-cookbook loop float32",
]  # fmt: skip


@pytest.mark.slow
def test_all_systems_run_with_random_weights(tmp_path: Path) -> None:
    systems = [*SYSTEMS, *(["TRL SFTTrainer packed float32"] if find_spec("trl") else [])]
    command = [
        sys.executable, str(BENCHMARK), "--shape", "tiny", "--steps", "6", "--batch-size", "2", "--repeats", "1",
        "--out", str(tmp_path / "out.json"), "--systems", *systems,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    assert [one["system"] for one in measured] == systems
    for one in measured:
        assert one["tokens_per_s"] > 0
        assert 0 < one["mfu"] < 1
