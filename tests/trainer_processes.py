"""Trainings in processes of their own, which tests kill: started from one server that has imported the trainer."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tiny import save_backbone

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["polyhead_trainer.run", "trainer_processes"])

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "lemon": "yellow"}


def write_run(
    folder: Path, *, method: str = "lora", quantization: str = "int8", steps: int = 12, dropout: float = 0.1
) -> Path:
    """A configuration with its data and tiny backbone in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": f"Colour of {thing}, {number}:", "completion": f" {colour}" * (1 + number % 3)})
        for number in range(4)
        for thing, colour in COLOURS.items()
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[6:]))
    (folder / "held_out.jsonl").write_text("\n".join(lines[:6]))
    if not (folder / "backbone").exists():
        save_backbone("llama", folder / "backbone")
    adapter = f"rank = 4\ndropout = {dropout}" if method == "lora" else f'method = "{method}"'
    (folder / "run.toml").write_text(f"""
output = "{folder}/adapters/colours"
[backbone]
source = "{folder}/backbone"
quantization = "{quantization}"
cache_dir = "{folder}/cache"
[adapter]
{adapter}
[data]
train = ["{folder}/train.jsonl"]
held_out = ["{folder}/held_out.jsonl"]
[training]
max_steps = {steps}
batch_size = 7
learning_rate = 2e-3
num_threads = 1
[evaluate]
generate_examples = 2
max_new_tokens = 2
[checkpoint]
every_steps = 2
""")
    return folder / "run.toml"


def start(
    file: Path, *overrides: str, resume: bool = False, prepare: Callable[..., None] | None = None, argument: Any = None
) -> BaseProcess:
    """`trainer run` in a new process; `prepare(argument)` is called in it before."""
    process = _CONTEXT.Process(target=_train, args=(file, overrides, resume, prepare, argument))
    process.start()
    return process


def finish(file: Path, *overrides: str, **options: Any) -> int:
    """Exit status of a run: 0, 1 with its error in `<file>.error`, or minus the signal that killed it."""
    process = start(file, *overrides, **options)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def curve(file: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of a finished run."""
    record = json.loads((file.parent / "adapters/colours/polyhead_metrics.json").read_text())
    return [(step["loss"], step["grad_norm"]) for step in record["curve"]]


def _train(
    file: Path, overrides: tuple[str, ...], resume: bool, prepare: Callable[..., None] | None, argument: Any
) -> None:
    from rich.console import Console

    from polyhead_core.errors import PolyheadError
    from polyhead_trainer.config import load_config
    from polyhead_trainer.run import run

    if prepare is not None:
        prepare(argument)
    try:
        run(load_config(file, overrides), Console(quiet=True), resume=resume)
    except PolyheadError as error:
        file.with_suffix(".error").write_text(f"{type(error).__name__}: {error.message}")
        raise SystemExit(1) from error


def _hold(output: Path, taken: Any, leave: Any) -> None:
    from polyhead_trainer.run_lock import only_run_into

    with only_run_into(output):
        taken.set()
        leave.wait()


def holding(output: Path) -> tuple[BaseProcess, Any]:
    """A process that has the lock of `output` until the event is set, or the process killed."""
    taken, leave = _CONTEXT.Event(), _CONTEXT.Event()
    process = _CONTEXT.Process(target=_hold, args=(output, taken, leave))
    process.start()
    assert taken.wait(60)
    return process, leave


def die_at_disk_call(number: int) -> None:
    """Kills this process at its number-th fsync, rename or mkdir: between any two things that reach the disk."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    for name in ("fsync", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def limit_file_size(num_bytes: int) -> None:
    """Files cannot grow beyond this: what a full disk does to a writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def kill_after(process: BaseProcess, seconds: float) -> None:
    time.sleep(seconds)
    process.kill()
    process.join()


def own_memory_bytes() -> int:
    """Of this process alone: without pages of files, which processes share."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def _load_and_shard(rank: int, size: int, port: int, file: Path) -> None:
    """A rank that loads and shards its model as a run does, and writes down the most memory that it had meanwhile."""
    import torch
    from torch._C._distributed_c10d import TCPStore

    from polyhead_trainer import backbones, methods
    from polyhead_trainer.config import load_config
    from polyhead_trainer.parallel import joined, parallelize

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    config = load_config(file)
    with joined("cpu", 60, TCPStore("127.0.0.1", port, is_master=False)) as ranks:
        before = own_memory_bytes()
        most, done = before, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.001):
                most = max(most, own_memory_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        tuned = methods.tune(backbones.load(backbones.on_host(config.backbone), shared=True), config.adapter, 0)
        parallelize(tuned.model, config.parallel, ranks)
        done.set()
        watcher.join()
    file.with_suffix(f".memory-{rank}").write_text(str(most - before))


def check_no_rank_holds_the_whole_model(file: Path, whole: int) -> None:
    """Of two; `whole`: the model's bytes."""
    from torch._C._distributed_c10d import TCPStore
    from torch.multiprocessing.spawn import start_processes

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_processes(_load_and_shard, (2, store.port, file), nprocs=2, start_method="forkserver")
    for rank in range(2):
        most = int(file.with_suffix(f".memory-{rank}").read_text())
        print(f"rank {rank}: at most {most:,} bytes of its own, of a model of {whole:,}")
        # Its half, and while a layer is cut into shards that layer.
        assert most < whole * 0.7
