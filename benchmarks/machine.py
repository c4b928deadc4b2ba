"""Where a benchmark ran: processor, versions and commit, so that its numbers can be read later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "grpcio", "polyhead")


def machine_facts() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "isa": _vector_extensions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def say_if_busy(facts: dict[str, Any]) -> None:
    """Threads that wait for each other lose most where another process has one of their cores."""
    if facts["load_average"] > 0.5 * facts["cores"]:
        print(f"warning: load average {facts['load_average']:.1f} before the start: not to be trusted", file=sys.stderr)


def silence_peft() -> None:
    """peft asks transformers for a property that is deprecated: nothing that a reader of the report could mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")


def shown(path: Path) -> str:
    """A path as a report may show it: relative to the working directory, or the name alone if it lies elsewhere."""
    absolute, here = path.resolve(), Path.cwd().resolve()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else path.name


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor()


def _vector_extensions() -> list[str]:
    """Of those that matter here: one name of a processor can stand for several of its kinds."""
    flags = set(_cpuinfo("flags").split())
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return [flag for flag in wanted if flag in flags]


def _cpuinfo(field: str) -> str:
    """The first processor's."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _version(package: str) -> str:
    """Empty for what is run from its sources, as on a machine that installs nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
