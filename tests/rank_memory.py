"""Ranks of a real run that write down the most bytes of tensors that each of them held, as torch's profiler saw it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch._C._profiler import _EventType
from torch.multiprocessing.spawn import start_processes
from torch.profiler import ProfilerActivity, profile, record_function

from polyhead_trainer import run as run_module
from polyhead_trainer.config import ParallelSection, RunConfig
from polyhead_trainer.evaluate import Evaluator, Measures
from polyhead_trainer.parallel import Parallel, Ranks
from polyhead_trainer.parallel.apply import local
from polyhead_trainer.tasks.classification import ClassificationEvaluator
from polyhead_trainer.tasks.preference import PreferenceEvaluator
from polyhead_trainer.tasks.seq2seq import Seq2SeqEvaluator

EVALUATORS: list[Any] = [Evaluator, ClassificationEvaluator, PreferenceEvaluator, Seq2SeqEvaluator]
ON_RANKS, MEASURING, WHOLE = "the model is on its ranks", "measuring begins", "what is saved is whole"


def measured_peaks(config: RunConfig, num_ranks: int) -> list[int]:
    """Bytes of each rank, from the first measurement until the main rank has gathered what it will save."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_processes(_rank, (num_ranks, store.port, config), nprocs=num_ranks, start_method="forkserver")
    return [int(_written_by(rank, config).read_text()) for rank in range(num_ranks)]


def _written_by(rank: int, config: RunConfig) -> Path:
    return config.output.with_name(f"{config.output.name}.peak-{rank}")


def _rank(rank: int, size: int, port: int, config: RunConfig) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    parts: list[int] = []
    parallelize, gather_trained = run_module.parallelize, run_module.gather_trained

    def parallelized(model: nn.Module, settings: ParallelSection, ranks: Ranks) -> Parallel:
        profiler.start()
        parallel = parallelize(model, settings, ranks)
        parts.append(sum(local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())))
        _mark(ON_RANKS)
        return parallel

    def gathered(*arguments: Any, **options: Any) -> None:
        gather_trained(*arguments, **options)
        _mark(WHOLE)

    run_module.parallelize, run_module.gather_trained = parallelized, gathered
    for kind in EVALUATORS:
        kind.measure = _marked(kind.measure)
    run_module.run(config, Console(quiet=True), store=TCPStore("127.0.0.1", port, is_master=False))
    gc.collect()  # FSDP's modules and states refer to each other
    profiler.stop()
    assert profiler.profiler is not None
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    held_by_then = config.parallel.strategy == "ddp"
    peak = parts[0] + _most(sorted(_events(tree), key=lambda event: event.start_time_ns), held_by_then)
    _written_by(rank, config).write_text(str(peak))


def _marked(measure: Callable[[Any, nn.Module], Measures]) -> Callable[[Any, nn.Module], Measures]:
    def marked(evaluator: Any, model: nn.Module) -> Measures:
        _mark(MEASURING)
        return measure(evaluator, model)

    return marked


def _mark(name: str) -> None:
    with record_function(name):
        pass


def _events(tree: Sequence[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


def _most(events: Sequence[Any], held_by_then: bool) -> int:
    """Most bytes between MEASURING and WHOLE, beside the model's. `held_by_then`: what was made before ON_RANKS and
    was still there counts: DDP's buckets, not FSDP's shards."""
    for_a_moment = _never_given_up(events)
    sizes: dict[int, int] = {}
    held = most = 0
    counts = False
    for number, event in enumerate(events):
        if event.name == ON_RANKS and not held_by_then:
            sizes, held = {}, 0
        counts = (counts or event.name == MEASURING) and event.name != WHOLE
        if event.tag == _EventType.Allocation:
            pointer, size = event.extra_fields.ptr, event.extra_fields.alloc_size
            moment = size if number in for_a_moment else 0
            if size > 0 and not moment:
                sizes[pointer] = size
            held += size - moment if size > 0 else -sizes.pop(pointer, 0)
            most = max(most, held + moment) if counts else most
    return most


def _never_given_up(events: Sequence[Any]) -> set[int]:
    """Places among `events` of what a thread of gloo's gave up, unseen by the profiler, when a collective was over: by
    the end of the run all else is gone."""
    lasting: dict[int, int] = {}
    unseen = set()
    for number, event in enumerate(events):
        if event.tag != _EventType.Allocation:
            continue
        before = lasting.pop(event.extra_fields.ptr, None)
        if event.extra_fields.alloc_size > 0:
            if before is not None:
                unseen.add(before)
            lasting[event.extra_fields.ptr] = number
    return unseen | set(lasting.values())
