"""One run from its configuration to the published adapter: load, measure, train, measure again, publish."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch._C._distributed_c10d import Store

from polyhead_core.backbone import Backbone
from polyhead_trainer import backbones, methods, report
from polyhead_trainer.checkpoint import CheckpointDirectory, Checkpointer, RunIdentity, SavedRun, Stateful, restore
from polyhead_trainer.config import AdapterSettings, RunConfig
from polyhead_trainer.data import ExampleStream
from polyhead_trainer.divergence import LastGood, diverged_at_the_end, keep_what_is_left
from polyhead_trainer.energy import EnergyMeter, readable_counters
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.held_out_watch import HeldOutWatch
from polyhead_trainer.loop import TrainingLoop
from polyhead_trainer.methods import Tuned
from polyhead_trainer.out_of_memory import explaining_out_of_memory
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.parallel import (
    Parallel,
    Ranks,
    check_possible,
    gather_trained,
    joined,
    parallelize,
    without_backward,
)
from polyhead_trainer.parallel.memory import RankMemoryMeter, peak_memory_bytes
from polyhead_trainer.profiling import StepProfiler
from polyhead_trainer.progress import TrainingProgress
from polyhead_trainer.publish import check_output, publish
from polyhead_trainer.record import BackboneFacts, DataFacts, RunRecord, TrainableFacts, count_shared
from polyhead_trainer.run_lock import only_run_into
from polyhead_trainer.storage import writing
from polyhead_trainer.tasks import Evaluator, open_task
from polyhead_trainer.tokens import padding_id
from polyhead_trainer.tracking import (
    EventFiles,
    RunTracking,
    check_tracking,
    optional_trackers,
    unwinding_at_sigterm,
)
from polyhead_trainer.training_data import open_data
from polyhead_trainer.utilization import Utilization, count_flops, mean_batch, multiplied_dtypes, peak_of


@dataclass(frozen=True, kw_only=True)
class RunResult:
    record: RunRecord
    content_hash: str


def run(
    config: RunConfig,
    console: Console,
    *,
    overwrite: bool = False,
    resume: bool = False,
    store: Store | None = None,
) -> RunResult:
    """Raises PolyheadError for everything that the user can mend.

    Where the environment names other ranks, this is one of them: they meet at `store`, or as torchrun says.
    """
    with joined(config.backbone.device, config.parallel.timeout_s, store) as ranks:
        shown = console if ranks.is_main else Console(quiet=True)
        with explaining_out_of_memory(config, ranks.size):
            return _run(config, shown, ranks, overwrite, resume)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """All that is there before the first step."""

    config: RunConfig
    """With the labels that the data have."""
    facts: BackboneFacts
    data: DataFacts
    stream: ExampleStream | None
    trainable: TrainableFacts
    tuned: Tuned
    loop: TrainingLoop
    evaluator: Evaluator
    utilization: Utilization | None
    """None where its FLOPs cannot be counted."""
    watch: HeldOutWatch
    tracking: RunTracking
    profiler: StepProfiler


@dataclass(frozen=True, kw_only=True)
class _Trained:
    progress: TrainingProgress
    memory: RankMemoryMeter
    energy: EnergyMeter
    saved: SavedRun
    """As the run began, or where it was continued."""
    last_good: LastGood
    seconds: float


def _run(config: RunConfig, console: Console, ranks: Ranks, overwrite: bool, resume: bool) -> RunResult:
    started = time.perf_counter()
    check_possible(config, ranks)
    check_output(config.output, overwrite)
    check_tracking(config.tracking)
    checkpoints = CheckpointDirectory(config.output)
    if not resume:
        checkpoints.check_fresh()
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)

    run = _prepare(config, console, ranks)
    report.print_plan(console, run.config, run.facts, run.data, run.trainable, run.loop.num_steps)
    # One of several ranks may be waiting for the others when the signal comes, and would go on waiting.
    unwinding = unwinding_at_sigterm() if ranks.size == 1 else nullcontext()
    alone = only_run_into(config.output) if ranks.is_main else nullcontext()
    with unwinding, alone, run.tracking.failing_with():
        return _train_and_publish(run, checkpoints, console, ranks, overwrite, started)


def _train_and_publish(
    run: _Prepared, checkpoints: CheckpointDirectory, console: Console, ranks: Ranks, overwrite: bool, started: float
) -> RunResult:
    trained = _train(run, checkpoints, console, ranks)
    console.print("measuring the tuned model on the same examples")
    with without_backward(run.tuned.model):
        after = ranks.from_main(run.evaluator.measure(run.tuned.model))
    run.tracking.measured(after, run.loop.step)
    if (error := diverged_at_the_end(run.loop, trained.saved.before, after)) is not None:
        trained.last_good.after_divergence(run.loop)
        raise _diverged(run, error, trained.last_good, ranks)

    record = RunRecord(
        config=run.config,
        backbone=run.facts,
        data=run.data.after(run.stream),
        trainable=run.trainable,
        before=trained.saved.before,
        after=after,
        curve=trained.progress.history,
        held_out_curve=run.watch.losses,
        questions=[item.example.question for item in run.evaluator.answered],
        references=[item.example.reference for item in run.evaluator.answered],
        train_seconds=trained.seconds,
        total_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(run.loop.device),
        num_ranks=ranks.size,
        rank_bytes=trained.memory.as_dict() if ranks.size > 1 else None,
        energy_joules=trained.energy.joules,
        mfu=trained.progress.mfu,
        peak_flops_per_s=run.utilization.peak.flops_per_s if run.utilization else None,
        peak_flops_source=run.utilization.peak.source if run.utilization else "",
        operators=run.profiler.operators,
    )
    content = _publish(run, record, checkpoints, ranks, overwrite)
    report.print_outcome(console, record)
    kind = "adapter" if run.tuned.is_adapter else "model"
    report.say(console, f"{kind} {run.config.output} ({content[:12]})")
    return RunResult(record=record, content_hash=content)


def _prepare(config: RunConfig, console: Console, ranks: Ranks) -> _Prepared:
    with ranks.main_first():  # which converts the backbone, if that has not been done
        alone = ranks.size == 1
        section = config.backbone if alone else backbones.of_rank(config.backbone, ranks.device)
        backbone = backbones.load(section, shared=not alone)
    task = open_task(config, backbone)
    config = config.with_labels(task.labels)
    data = open_data(config.data, backbone, task.encode)
    evaluator = task.evaluator(data.held_out.examples)

    facts = BackboneFacts.of(backbone)
    num_untouched = count_shared(task.backbone.model, backbone.model)
    tuned = methods.tune(task.backbone, config.adapter, config.training.seed)
    trainable = TrainableFacts.of(tuned.model, facts, num_untouched)
    parallel = parallelize(tuned.model, config.parallel, ranks)
    if config.training.packing:
        prepare_packing(tuned.model, data.sample(), padding_id(backbone.tokenizer))
    watch = HeldOutWatch(evaluator, config.training, lambda line: report.say(console, line))
    trackers = [EventFiles(config.output), *optional_trackers(config.tracking)] if ranks.is_main else []
    return _Prepared(
        config=config,
        facts=facts,
        data=DataFacts.of(config, data.train, data.held_out),
        stream=data.stream,
        trainable=trainable,
        tuned=tuned,
        loop=TrainingLoop(tuned, task.objective(tuned), data.examples, config.training, parallel),
        evaluator=evaluator,
        utilization=_utilization(config, backbone, parallel, tuned, len(data.examples)),
        watch=watch,
        tracking=RunTracking(trackers, watch),
        profiler=StepProfiler(config.profile, config.output, ranks.device, ranks.rank),
    )


def _utilization(
    config: RunConfig, backbone: Backbone, parallel: Parallel, tuned: Tuned, num_examples: int
) -> Utilization | None:
    # Each pair of preferences meets the backbone as well.
    flops = count_flops(tuned.model) if config.task != "preference" else None
    if flops is None:
        return None
    dtype = getattr(torch, config.parallel.param_dtype) if config.parallel.param_dtype else backbone.dtype
    dtypes = multiplied_dtypes(dtype, backbone.quantization)
    return Utilization(
        flops=flops,
        measure_peak=partial(peak_of, parallel.device, dtypes, parallel.ranks.size),
        examples_per_step=mean_batch(num_examples, config.training.batch_size),
    )


def _train(run: _Prepared, checkpoints: CheckpointDirectory, console: Console, ranks: Ranks) -> _Trained:
    """From the first step, or from the latest checkpoint on."""
    config, loop, tuned, watch, tracking = run.config, run.loop, run.tuned, run.watch, run.tracking
    identity = RunIdentity.of(config, run.data, run.facts)
    progress = TrainingProgress(console, run.utilization)
    energy = EnergyMeter(readable_counters(loop.device))
    stateful: dict[str, Stateful] = {
        "progress": progress,
        "held_out_watch": watch,
        "energy": energy,
        "tracking": tracking,
    }
    if run.stream is not None:
        stateful["data"] = run.stream
    latest = checkpoints.latest()
    if latest is not None:
        for remark in identity.check_continues(SavedRun.read(latest).identity, latest):
            report.say(console, remark)
        saved = restore(latest, loop, stateful, ranks)
        report.say(console, f"continuing {latest} after step {saved.step}")
    else:
        run.profiler.check(loop.num_steps)
        console.print("measuring the backbone on the held-out examples")
        before = measure_before(run.evaluator, tuned, config.adapter)
        saved = SavedRun(identity=identity, before=before, hooks={})
    checkpointer = Checkpointer(checkpoints, config.checkpoint, saved, stateful, ranks)
    memory = RankMemoryMeter(tuned.model, loop.optimizer)
    last_good = LastGood()
    started = time.perf_counter()
    energy.start()
    tracking.begin(config, saved.before, progress.history)
    try:
        with progress, run.profiler:
            loop.run([progress, watch, memory, energy, tracking, last_good, checkpointer, run.profiler])
        checkpointer.wait()
    except TrainingDiverged as error:
        checkpointer.close()
        raise _diverged(run, error, last_good, ranks) from error
    finally:
        checkpointer.close()
    if loop.stopped_because is not None:
        report.say(console, f"stopped: {loop.stopped_because}")
    if watch.restore_best(tuned):
        report.say(console, f"kept: the weights of step {watch.best_step}")
    seconds = saved.train_seconds + time.perf_counter() - started
    if run.utilization is not None:
        run.utilization.measure_again()
    return _Trained(
        progress=progress,
        memory=memory,
        energy=energy,
        saved=saved,
        last_good=last_good,
        seconds=seconds,
    )


def _diverged(run: _Prepared, error: TrainingDiverged, last_good: LastGood, ranks: Ranks) -> TrainingDiverged:
    """What the main rank has kept is told of on all of them."""
    if ranks.is_main:
        error = keep_what_is_left(error, last_good, run.tuned, run.config.output, run.facts, ranks)
    return TrainingDiverged(ranks.from_main(error.message), step=error.step, examples=error.examples)


def measure_before(evaluator: Evaluator, tuned: Tuned, settings: AdapterSettings) -> Measures:
    """Of the backbone; but what is known of earlier tasks is what the run starts with, an adapter of theirs perhaps."""
    with without_backward(tuned.model):
        with tuned.baseline():
            before = evaluator.measure(tuned.model)
        if getattr(settings, "warm_start", None) is None:
            return before
        return replace(before, earlier_loss=evaluator.earlier_loss(tuned.model))


def _publish(run: _Prepared, record: RunRecord, checkpoints: CheckpointDirectory, ranks: Ranks, overwrite: bool) -> str:
    """The identity of what was written, on the main rank; empty on the others."""
    latest = checkpoints.latest()
    kept = f"the trained state is in {latest}: --resume" if latest else "nothing was kept"
    content = ""
    gather_trained(run.tuned.model, ranks, frozen_too=run.tuned.saves_frozen)
    if ranks.is_main:
        events = EventFiles(record.config.output)
        with writing(record.config.output, kept):
            content = publish(run.tuned, record, events, overwrite=overwrite)
        run.tracking.finish()
        checkpoints.remove()
        events.remove()
    ranks.barrier()
    return content
