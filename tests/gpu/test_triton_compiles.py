"""Every kernel compiles to machine code for a CUDA processor; no device is needed for that. Half a minute each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not compiled")

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "server" / "polyhead_core" / "kernels" / "triton"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), str(capability)],
        env=environment
        | {"PYTHONPATH": str(HERE.parent), "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    defined = {name for file in KERNELS.glob("*.py") for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())}
    assert defined == set(done.stdout.split())
