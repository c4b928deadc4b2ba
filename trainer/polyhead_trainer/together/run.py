"""One run of several adapters, from its configuration to a published directory for each that did not diverge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.text import Text

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones, report
from polyhead_trainer.checkpoint import CheckpointDirectory, RunIdentity, SavedRun, Stateful
from polyhead_trainer.config import LoraSettings, RunConfig, TogetherConfig
from polyhead_trainer.divergence import LastGood, diverged_at_the_end, keep_what_is_left
from polyhead_trainer.energy import EnergyMeter, readable_counters
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.held_out_watch import HeldOutWatch
from polyhead_trainer.loop import TrainingLoop
from polyhead_trainer.out_of_memory import explaining_out_of_memory
from polyhead_trainer.parallel import Ranks, joined
from polyhead_trainer.parallel.memory import peak_memory_bytes
from polyhead_trainer.profiling import StepProfiler
from polyhead_trainer.progress import TrainingProgress
from polyhead_trainer.publish import check_output, publish
from polyhead_trainer.record import BackboneFacts, DataFacts, RunRecord, TrainableFacts, count_parameters, read_record
from polyhead_trainer.run import RunResult, measure_before
from polyhead_trainer.run_lock import only_run_into
from polyhead_trainer.storage import writing
from polyhead_trainer.tasks import Evaluator, open_task
from polyhead_trainer.together.checkpoint import SavedTogether, TogetherCheckpointer, restore_together
from polyhead_trainer.together.loop import Course, RoundHook, train_together
from polyhead_trainer.together.model import Member, SharedBackbone
from polyhead_trainer.together.progress import TogetherProgress
from polyhead_trainer.tracking import EventFiles, RunTracking, check_tracking
from polyhead_trainer.training_data import RunData, open_data


@dataclass(frozen=True, kw_only=True)
class TogetherResult:
    published: dict[str, RunResult]
    failures: dict[str, TrainingDiverged]

    def raise_for_failures(self) -> None:
        """Raises TrainingDiverged, which says what diverged and what did not."""
        for first in self.failures.values():
            told = "; ".join(f"{name}: {error.message}" for name, error in self.failures.items())
            done = f"published: {', '.join(self.published)}" if self.published else "nothing was published"
            raise TrainingDiverged(f"{told}; {done}", step=first.step, examples=first.examples)


@dataclass(kw_only=True)
class _Adapter:
    """All that belongs to one of them."""

    config: RunConfig
    data: RunData
    facts: DataFacts
    evaluator: Evaluator
    trainable: TrainableFacts
    course: Course
    progress: TrainingProgress
    watch: HeldOutWatch
    tracking: RunTracking
    overwrite: bool
    saved: SavedRun | None = field(default=None)

    @property
    def name(self) -> str:
        return self.course.member.name

    @property
    def stateful(self) -> dict[str, Stateful]:
        stream: dict[str, Stateful] = {} if self.data.stream is None else {"data": self.data.stream}
        return {"progress": self.progress, "held_out_watch": self.watch, "tracking": self.tracking, **stream}


def run_together(
    config: TogetherConfig, console: Console, *, overwrite: bool = False, resume: bool = False, nproc: int = 1
) -> TogetherResult:
    """Raises PolyheadError for everything that the user can mend; an adapter that diverges is in the result."""
    with joined(config.shared.backbone.device, config.shared.parallel.timeout_s) as ranks:
        if max(nproc, ranks.size) > 1:
            raise ConfigError(
                f"[[adapters]] are trained together in one process, and {max(nproc, ranks.size)} were started: leave "
                "--nproc out, or give each adapter a configuration of its own"
            )
        with explaining_out_of_memory(config, num_ranks=1):
            return _run(config, console, overwrite, resume)


def _run(config: TogetherConfig, console: Console, overwrite: bool, resume: bool) -> TogetherResult:
    started = time.perf_counter()
    check_tracking(config.shared.tracking)
    checkpoints = CheckpointDirectory(config.output)
    if not resume:
        checkpoints.check_fresh()
    replaces = {name: overwrite or (resume and _is_ours(run)) for name, run in config.runs.items()}
    for name, run in config.runs.items():
        check_output(run.output, replaces[name])
    settings = config.shared.training
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)

    backbone = backbones.load(config.shared.backbone)
    facts = BackboneFacts.of(backbone)
    shared = SharedBackbone(backbone, settings.logit_chunk)
    adapters = [_open(run, name, shared, facts, console, replaces[name]) for name, run in config.runs.items()]
    shared.prepare([example for adapter in adapters for example in adapter.data.sample()])
    energy = EnergyMeter(readable_counters(backbone.device))
    published = {}
    with ExitStack() as stack:
        stack.enter_context(only_run_into(config.output))
        for adapter in adapters:
            stack.enter_context(adapter.tracking.failing_with())
        _train(config, shared, adapters, facts, checkpoints, console, energy)
        for adapter in adapters:
            if adapter.course.failure is None:
                joules = _part(energy.joules, adapter, adapters)
                finished = _finish(adapter, adapters, shared, facts, checkpoints, console, started, joules)
                if finished is not None:
                    published[adapter.name] = finished
        checkpoints.remove()
    failures = {adapter.name: adapter.course.failure for adapter in adapters if adapter.course.failure is not None}
    return TogetherResult(published=published, failures=failures)


def _is_ours(run: RunConfig) -> bool:
    """Whether the output is what this very run leaves: it was killed between the first publication and the last."""
    record = read_record(run.output)
    return record is not None and record["config"] == run.model_dump(mode="json")


def _open(
    config: RunConfig, name: str, shared: SharedBackbone, facts: BackboneFacts, console: Console, overwrite: bool
) -> _Adapter:
    backbone: Backbone = shared.backbone
    task = open_task(config, backbone)
    data = open_data(config.data, backbone, task.encode)
    evaluator = task.evaluator(data.held_out.examples)
    assert isinstance(config.adapter, LoraSettings), "checked with the configuration"
    num_untouched = count_parameters(backbone.model)
    member = shared.add(name, config.adapter, config.training.seed)
    with shared.only(member):
        trainable = TrainableFacts.of(member.tuned.model, facts, num_untouched)
        loop = TrainingLoop(member.tuned, task.objective(member.tuned), data.examples, config.training)
    progress = TrainingProgress(Console(quiet=True))
    watch = HeldOutWatch(evaluator, config.training, lambda line: report.say(console, f"{name}: {line}"))
    tracking = RunTracking([EventFiles(config.output)], watch)
    last_good = LastGood()

    def keep(error: TrainingDiverged) -> TrainingDiverged:
        tracking.fail()
        kept = keep_what_is_left(error, last_good, member.tuned, config.output, facts, Ranks())
        report.say(console, f"{name} has diverged, the others go on: {kept.message}")
        return kept

    facts_of_data = DataFacts.of(config, data.train, data.held_out)
    console.rule(Text(name))
    report.print_plan(console, config, facts, facts_of_data, trainable, loop.num_steps)
    return _Adapter(
        config=config,
        data=data,
        facts=facts_of_data,
        evaluator=evaluator,
        trainable=trainable,
        course=Course(member=member, loop=loop, hooks=[progress, watch, tracking, last_good], keep_what_is_left=keep),
        progress=progress,
        watch=watch,
        tracking=tracking,
        overwrite=overwrite,
    )


def _train(
    config: TogetherConfig,
    shared: SharedBackbone,
    adapters: Sequence[_Adapter],
    facts: BackboneFacts,
    checkpoints: CheckpointDirectory,
    console: Console,
    energy: EnergyMeter,
) -> None:
    """From the first round, or from the latest checkpoint on."""
    identities = {adapter.name: RunIdentity.of(adapter.config, adapter.facts, facts) for adapter in adapters}
    stateful = {adapter.name: adapter.stateful for adapter in adapters}
    courses = [adapter.course for adapter in adapters]
    profiler = StepProfiler(config.shared.profile, config.output, shared.backbone.device)
    latest = checkpoints.latest()
    if latest is not None:
        for remark in SavedTogether.read(latest).check_continues(identities, latest):
            report.say(console, remark)
        saved = restore_together(latest, shared, courses, stateful, energy)
        report.say(console, f"continuing {latest} after round {saved.round}")
    else:
        profiler.check(max(course.loop.num_steps for course in courses))
        console.print("measuring the backbone on the held-out examples of each")
        before = {}
        for adapter in adapters:
            member: Member = adapter.course.member
            with shared.only(member):
                measures = measure_before(adapter.evaluator, member.tuned, adapter.config.adapter)
            before[adapter.name] = SavedRun(identity=identities[adapter.name], before=measures, hooks={})
        saved = SavedTogether(round=0, adapters=before, failures={}, energy={})
    for adapter in adapters:
        own = adapter.saved = saved.adapters[adapter.name]
        adapter.tracking.begin(adapter.config, own.before, adapter.progress.history)
    checkpointer = TogetherCheckpointer(checkpoints, config.shared.checkpoint, shared, saved, stateful, energy)
    progress = TogetherProgress(console, {adapter.name: adapter.progress for adapter in adapters})
    energy.start()
    try:
        with progress, profiler:
            hooks: list[RoundHook] = [progress, _AfterRound(energy), checkpointer, profiler]
            train_together(shared, courses, config.shared.training, hooks)
        checkpointer.wait()
    finally:
        checkpointer.close()
    if profiler.operators:
        console.print(report.operators_table(profiler.operators))
        report.say(console, f"traces of the profiled rounds: {profiler.folder}")


@dataclass(frozen=True)
class _AfterRound:
    """Implements RoundHook."""

    energy: EnergyMeter

    def after_round(self, courses: Sequence[Course]) -> None:
        self.energy.read()


def _part(joules: dict[str, float], adapter: _Adapter, adapters: Sequence[_Adapter]) -> dict[str, float]:
    """The adapter's, by tokens, as its seconds are."""
    share = adapter.progress.num_tokens / max(1, sum(other.progress.num_tokens for other in adapters))
    return {name: spent * share for name, spent in joules.items()}


def _finish(
    adapter: _Adapter,
    adapters: Sequence[_Adapter],
    shared: SharedBackbone,
    facts: BackboneFacts,
    checkpoints: CheckpointDirectory,
    console: Console,
    started: float,
    joules: dict[str, float],
) -> RunResult | None:
    """Measures and publishes one adapter; `joules` is what its training took.

    None where its last step has ruined it.
    """
    course, config = adapter.course, adapter.config
    member: Member = course.member
    assert adapter.saved is not None
    console.rule(Text(adapter.name))
    if course.loop.stopped_because is not None:
        report.say(console, f"stopped: {course.loop.stopped_because}")
    with shared.only(member):
        if adapter.watch.restore_best(member.tuned):
            report.say(console, f"kept: the weights of step {adapter.watch.best_step}")
        after = adapter.evaluator.measure(member.tuned.model)
        adapter.tracking.measured(after, course.loop.step)
        if (error := diverged_at_the_end(course.loop, adapter.saved.before, after)) is not None:
            course.failure = course.keep_what_is_left(error)
            return None
        record = RunRecord(
            config=config,
            backbone=facts,
            data=adapter.facts.after(adapter.data.stream),
            trainable=adapter.trainable,
            before=adapter.saved.before,
            after=after,
            curve=adapter.progress.history,
            held_out_curve=adapter.watch.losses,
            questions=[item.example.question for item in adapter.evaluator.answered],
            references=[item.example.reference for item in adapter.evaluator.answered],
            train_seconds=sum(step.seconds for step in adapter.progress.history),
            total_seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(shared.backbone.device),
            energy_joules=joules,
            trained_with=[other.name for other in adapters if other is not adapter],
        )
        latest = checkpoints.latest()
        kept = f"the trained state of all adapters is in {latest}: --resume" if latest else "nothing was kept"
        events = EventFiles(config.output)
        with writing(config.output, kept):
            content = publish(member.tuned, record, events, overwrite=adapter.overwrite)
        adapter.tracking.finish()
        events.remove()
    report.print_outcome(console, record)
    report.say(console, f"adapter {config.output} ({content[:12]})")
    return RunResult(record=record, content_hash=content)
