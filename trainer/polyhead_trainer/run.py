"""One run from its configuration to the published adapter: load, measure, train, measure again, publish."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch._C._distributed_c10d import Store

from polyhead_trainer import backbones, evaluate, methods, report
from polyhead_trainer.checkpoint import CheckpointDirectory, Checkpointer, RunIdentity, SavedRun, Stateful, restore
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import check_disjoint, load_examples
from polyhead_trainer.divergence import LastGood, keep_what_is_left
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.held_out_watch import HeldOutWatch
from polyhead_trainer.loop import TrainingLoop
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.parallel import Ranks, check_possible, gather_trained, joined, parallelize
from polyhead_trainer.parallel.memory import RankMemoryMeter
from polyhead_trainer.progress import TrainingProgress
from polyhead_trainer.publish import check_output, publish
from polyhead_trainer.record import BackboneFacts, DataFacts, RunRecord, TrainableFacts, count_parameters
from polyhead_trainer.storage import writing


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
        return _run(config, console if ranks.is_main else Console(quiet=True), ranks, overwrite, resume)


def _run(config: RunConfig, console: Console, ranks: Ranks, overwrite: bool, resume: bool) -> RunResult:
    started = time.perf_counter()
    check_possible(config, ranks)
    check_output(config.output, overwrite)
    checkpoints = CheckpointDirectory(config.output)
    if not resume:
        checkpoints.check_fresh()
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)

    with ranks.main_first():  # which converts the backbone, if that has not been done
        backbone = backbones.load(config.backbone if ranks.size == 1 else backbones.on_host(config.backbone))
    tokenizer = backbone.tokenizer
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train_data = load_examples(config.data.train, tokenizer, config.data.max_length)
    held_out = load_examples(config.data.held_out, tokenizer, config.data.max_length)
    check_disjoint(train_data.examples, held_out.examples)
    evaluator = evaluate.prepare(config.evaluate, held_out.examples, tokenizer, pad_id)

    facts = BackboneFacts.of(backbone)
    num_untouched = count_parameters(backbone.model)
    tuned = methods.tune(backbone, config.adapter, config.training.seed)
    data_facts = DataFacts.of(config, train_data, held_out)
    trainable = TrainableFacts.of(tuned.model, facts, num_untouched)
    parallel = parallelize(tuned.model, config.parallel, ranks)
    if config.training.packing:
        prepare_packing(tuned.model, train_data.examples, pad_id)
    objective = CompletionObjective(pad_id, config.training.logit_chunk, config.training.packing)
    loop = TrainingLoop(tuned, objective, train_data.examples, config.training, parallel)
    report.print_plan(console, config, facts, data_facts, trainable, loop.num_steps)

    identity = RunIdentity.of(config, data_facts, facts)
    progress = TrainingProgress(console)
    watch = HeldOutWatch(evaluator, config.training, lambda line: console.print(line, highlight=False))
    stateful: dict[str, Stateful] = {"progress": progress, "held_out_watch": watch}
    latest = checkpoints.latest()
    if latest is not None:
        identity.check_continues(SavedRun.read(latest).identity, latest)
        saved = restore(latest, loop, stateful, ranks)
        console.print(f"continuing {latest} after step {saved.step}", highlight=False, soft_wrap=True)
    else:
        console.print("measuring the backbone on the held-out examples")
        with tuned.baseline():
            saved = SavedRun(identity=identity, before=evaluator.measure(tuned.model), hooks={})
    before = saved.before
    checkpointer = Checkpointer(checkpoints, config.checkpoint, saved, stateful, ranks)
    memory = RankMemoryMeter(tuned.model, loop.optimizer)
    last_good = LastGood(num_ranks=ranks.size)
    train_started = time.perf_counter()
    try:
        with progress:
            loop.run([progress, watch, memory, last_good, checkpointer])
        checkpointer.wait()
    except TrainingDiverged as error:
        if ranks.is_main:
            raise keep_what_is_left(error, last_good, tuned, config.output, facts) from error
        raise
    finally:
        checkpointer.close()
    if loop.stopped_because is not None:
        console.print(f"stopped: {loop.stopped_because}", highlight=False, soft_wrap=True)
    if watch.restore_best(tuned):
        console.print(f"kept: the weights of step {watch.best_step}", highlight=False)
    train_seconds = saved.train_seconds + time.perf_counter() - train_started
    console.print("measuring the tuned model on the same examples")
    after = evaluator.measure(tuned.model)

    record = RunRecord(
        config=config,
        backbone=facts,
        data=data_facts,
        trainable=trainable,
        before=before,
        after=after,
        curve=progress.history,
        held_out_curve=watch.losses,
        questions=[item.example.question for item in evaluator.answered],
        references=[item.example.reference for item in evaluator.answered],
        train_seconds=train_seconds,
        total_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(backbone.device if ranks.size == 1 else ranks.device),
        num_ranks=ranks.size,
        rank_bytes=memory.as_dict() if ranks.size > 1 else None,
    )
    kept = f"the trained state is in {latest}: --resume" if (latest := checkpoints.latest()) else "nothing was kept"
    content = ""
    gather_trained(tuned.model, ranks)
    if ranks.is_main:
        with writing(config.output, kept):
            content = publish(tuned, record, overwrite=overwrite)
        checkpoints.remove()
    ranks.barrier()
    report.print_outcome(console, record)
    kind = "adapter" if tuned.is_adapter else "model"
    console.print(f"{kind} {config.output} ({content[:12]})", highlight=False, soft_wrap=True)
    return RunResult(record=record, content_hash=content)


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
