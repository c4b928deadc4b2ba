"""What to say when memory runs out: what the run needs by part, what there is, and the settings that need less."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from polyhead_core.errors import PolyheadError
from polyhead_trainer.checkpoint.directory import CheckpointDirectory
from polyhead_trainer.checkpoint.identity import may_differ
from polyhead_trainer.config import RunConfig, TogetherConfig
from polyhead_trainer.errors import OutOfMemory
from polyhead_trainer.estimate import Estimate, estimate

CPU_ALLOCATION_FAILED = "can't allocate memory"
"""In the RuntimeError of torch's CPU allocator, which has no class of its own."""
MIB = 1 << 20
Changes = tuple[str, ...]
"""Settings with their values, as `--set` takes them but for the spaces."""


@contextmanager
def explaining_out_of_memory(config: RunConfig | TogetherConfig, num_ranks: int) -> Iterator[None]:
    """Raises OutOfMemory for allocations that fail inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_allocation(error):
            raise
        raise OutOfMemory(_explanation(config, num_ranks, str(error))) from error


def _is_allocation(error: MemoryError | RuntimeError) -> bool:
    """Whether it says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATION_FAILED in str(error)


def _explanation(config: RunConfig | TogetherConfig, num_ranks: int, reason: str) -> str:
    device = _runs(config)[0].backbone.device
    first_line = reason.strip().partition("\n")[0]
    message = f"out of memory on {device}: {first_line}"
    try:
        needed = estimate(config, nproc=num_ranks)
        smaller = list(_smaller(config, num_ranks, needed.peak))
    except (PolyheadError, MemoryError, RuntimeError) as error:
        return f"{message}; what the run needs cannot be estimated ({error})"
    parts = ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in needed.parts().items() if value)
    available = _available_bytes(device, num_ranks)
    message += f"; `trainer estimate` expects on each rank: {parts}; there are {available / MIB:,.0f} MiB"
    if not smaller:
        return f"{message}; no setting of the trainer would make it smaller: use a larger device or a smaller backbone"
    # What else runs on the device is unknown, so that an estimate below what there is in all may still not fit.
    listed = [(changes, peak) for changes, peak in smaller if peak <= available] or smaller
    told = "; ".join(f"{' and '.join(changes)} ({peak / MIB:,.0f} MiB)" for changes, peak in listed)
    return f"{message}; settings that need less: {told}{_while_measuring(config)}{_on_resume(config, listed)}"


def _while_measuring(config: RunConfig | TogetherConfig) -> str:
    size = max(run.evaluate.batch_size for run in _runs(config))
    return f"; where it ran out while measuring: evaluate.batch_size = {max(1, size // 4)}" if size > 1 else ""


def _on_resume(config: RunConfig | TogetherConfig, listed: Sequence[tuple[Changes, int]]) -> str:
    latest = CheckpointDirectory(config.output).latest()
    if latest is None:
        return ""
    every_change, _ = listed[-1]
    refused = [name for change in every_change if not may_differ(name := change.partition(" = ")[0])]
    without = f", but without {' and '.join(refused)}, which would make another run of it" if refused else ""
    return f"; with these --resume continues {latest}{without}"


def _smaller(config: RunConfig | TogetherConfig, num_ranks: int, least: int) -> Iterator[tuple[Changes, int]]:
    """(changes, expected peak in bytes), each with those before it, as far as they save something on `least`."""
    changes: Changes = ()
    for section, setting, value in _changes(config):
        candidate = _with(config, section, {setting: value})
        peak = _peak(candidate, num_ranks)
        if peak is not None and peak < 0.99 * least:
            config, least = candidate, peak
            changes = (*changes, f"{section}.{setting} = {value}")
            yield changes, peak


def _changes(config: RunConfig | TogetherConfig) -> Iterator[tuple[str, str, int | str]]:
    """(section, setting, value): what a run can be continued with first, then from the cheapest to the costliest in
    time."""
    runs = _runs(config)
    size = max(run.training.micro_batch_size or run.training.batch_size for run in runs)
    if size > 1:
        yield "training", "micro_batch_size", max(1, size // 4)
    evaluated = max(run.evaluate.batch_size for run in runs)
    if evaluated > 1:
        yield "evaluate", "batch_size", max(1, evaluated // 4)
    # Adapters that are trained together and drop out cannot be computed again.
    drops_out = len(runs) > 1 and any(getattr(run.adapter, "dropout", 0) for run in runs)
    if runs[0].training.activation_checkpointing != "all" and not drops_out:
        yield "training", "activation_checkpointing", "all"
    if size > 4:
        yield "training", "micro_batch_size", 1
    if any(run.training.optimizer in ("adamw", "sgd") for run in runs):
        yield "training", "optimizer", "adamw-8bit"
    if runs[0].backbone.quantization == "none" and runs[0].adapter.method != "full":
        yield "backbone", "quantization", "int8"


def _with(config: RunConfig | TogetherConfig, section: str, values: dict[str, Any]) -> RunConfig | TogetherConfig:
    """With these values in the section, of every run where there are several."""
    if isinstance(config, TogetherConfig):
        return replace(config, runs={name: _run_with(run, section, values) for name, run in config.runs.items()})
    return _run_with(config, section, values)


def _run_with(run: RunConfig, section: str, values: dict[str, Any]) -> RunConfig:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=values)})


def _runs(config: RunConfig | TogetherConfig) -> list[RunConfig]:
    return list(config.runs.values()) if isinstance(config, TogetherConfig) else [config]


def _peak(config: RunConfig | TogetherConfig, num_ranks: int) -> int | None:
    """None for settings that the run could not have."""
    try:
        found: Estimate = estimate(config, nproc=num_ranks)
    except PolyheadError:
        return None
    return found.peak


def _available_bytes(device: str, num_ranks: int) -> int:
    """All of the device's memory, whoever uses it now; of a host's, what it has for each rank on it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[1]
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // on_this_host
