"""Builds and loads the C++ kernels on first use; the result is cached by source, torch and processor features."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from polyhead_core.paths import default_cache_dir

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "kernels.cpp"
# -fopenmp for the compiler only: the symbols resolve to the OpenMP runtime that torch has loaded. Linking another one
# would put two thread pools on the same cores.
_FLAGS = [
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-std=c++20",
]


@cache
def load() -> Any | None:
    """`torch.ops.polyhead_cpu`, or None (after one warning) where the kernels cannot be built."""
    library = default_cache_dir() / "kernels" / f"polyhead_cpu-{_build_key()}.so"
    try:
        if not library.exists():
            _build(library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        logger.warning(
            "the C++ kernels could not be built, so the slow reference runs in their place (10 to 100 times slower, "
            "and not bit-identical across batches); install a C++ compiler to mend it. Cause: %s",
            error,
        )
        return None
    return torch.ops.polyhead_cpu


def _build(library: Path) -> None:
    """Compiles to a name of its own and moves it into place, so that two builders never see each other's halves."""
    library.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    logger.info("building the C++ kernels (once for this machine)")
    staged = library.with_suffix(f".{os.getpid()}.tmp")
    command = [cpp_extension.get_cxx_compiler(), *_FLAGS, "-shared", "-fPIC", str(_SOURCE), "-o", str(staged)]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise OSError(f"{command[0]} exited with {result.returncode}: {result.stderr[-2000:]}")
        staged.replace(library)
    finally:
        staged.unlink(missing_ok=True)
    logger.info("built the C++ kernels in %.0f s: %s", time.monotonic() - started, library)


def _build_key() -> str:
    digest = hashlib.sha256()
    for source in sorted([_SOURCE, *_FOLDER.glob("*.h")]):
        digest.update(source.read_bytes())
    for text in (torch.__version__, platform.machine(), _cpu_features(), " ".join(_FLAGS)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
