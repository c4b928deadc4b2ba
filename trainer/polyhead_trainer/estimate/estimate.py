"""Puts an estimate together: the model on the meta device, then dry runs of the costliest batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.activation_checkpointing import activation_checkpointing
from polyhead_trainer.batching import steps
from polyhead_trainer.config import AdapterSettings, LoraSettings, RunConfig, TogetherConfig
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.estimate.dry_run import DryRun
from polyhead_trainer.estimate.empty_backbone import empty_backbone
from polyhead_trainer.estimate.parts import Estimate, MicroBatch, ModelParts, copied_bytes, tensors_of
from polyhead_trainer.estimate.passes import (
    CPU,
    Pass,
    evaluation_passes,
    find_peaks,
    largest,
    optimizer_step,
    shape_only_products,
    text_evaluator,
)
from polyhead_trainer.estimate.ranks import Alone, Replicas
from polyhead_trainer.estimate.shards import Shards
from polyhead_trainer.evaluate import Evaluator
from polyhead_trainer.methods import Tuned, trained_parameters
from polyhead_trainer.neftune import noisy_embeddings
from polyhead_trainer.objectives import Objective
from polyhead_trainer.optimizers import state_bytes
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.parallel import Ranks, check_possible, micro_batches
from polyhead_trainer.schedule import count_steps
from polyhead_trainer.tasks import open_task
from polyhead_trainer.together.model import Member, Share, SharedBackbone
from polyhead_trainer.tokens import padding_id
from polyhead_trainer.training_data import RunData, open_data


def estimate(config: RunConfig | TogetherConfig, *, nproc: int = 1) -> Estimate:
    """Raises ConfigError, BackboneError, DataError."""
    if isinstance(config, TogetherConfig):
        return _estimate_together(config, nproc)
    check_possible(config, Ranks(size=nproc, device=torch.device(config.backbone.device)))
    num_shards = nproc if config.parallel.strategy == "fsdp" else 1
    backbone = empty_backbone(config.backbone)
    task = open_task(config, backbone)
    data = open_data(config.data, backbone, task.encode)
    held_out = data.held_out.examples
    evaluator = text_evaluator(task, config.evaluate, held_out)
    batches, accumulates = _micro_batches(config, data, nproc)

    before = set(map(id, tensors_of(backbone.model)))
    tuned = methods.tune(task.backbone, _fresh(config.adapter), config.training.seed)
    model = tuned.model
    parts = ModelParts.of(model, before, config, num_shards, saves_frozen=tuned.saves_frozen)
    dry = DryRun()
    ranks = _emptied(dry, model, config, nproc, on_cpu=parts.on_cpu, accumulates=accumulates)
    with (
        dry,
        shape_only_products(model, on_cpu=parts.on_cpu, packed=parts.packed_at_once),
        activation_checkpointing(model, config.training),
        noisy_embeddings(model, config.training.neftune_alpha),
    ):
        if config.training.packing:
            prepare_packing(model, batches[0], padding_id(backbone.tokenizer))
            ranks.after_forward()
        objective = task.objective(tuned)
        model.train()
        peaks = find_peaks(
            dry,
            ranks,
            passes=[_pass(tuned, objective, batch) for batch in batches],
            update=optimizer_step(tuned, ranks, config),
            evaluations=evaluation_passes(config, model, objective, held_out, evaluator),
            accumulates=accumulates,
        )
    optimizer = state_bytes(config.training.optimizer, ranks.stepped, config.training)
    trained = sum(parameter.nbytes for parameter in ranks.stepped)
    copies = copied_bytes(config, trained, optimizer, _num_steps(config, data), tuned.is_adapter)
    offloaded = config.parallel.cpu_offload and num_shards > 1
    return Estimate.of(parts, optimizer, copies, peaks, MicroBatch.of(batches[0]), offloaded=offloaded)


def _emptied(dry: DryRun, model: nn.Module, config: RunConfig, nproc: int, *, on_cpu: bool, accumulates: bool) -> Alone:
    """Takes the numbers out of `model`; says what its ranks hold. Raises ConfigError."""
    if nproc > 1 and config.parallel.strategy == "fsdp":
        return Shards(dry, model, config.parallel, nproc, on_cpu=on_cpu)
    dry.empty(model)
    parameters = list(trained_parameters(model).values())
    return Alone(dry, parameters) if nproc == 1 else Replicas(dry, parameters, accumulates=accumulates)


@dataclass(frozen=True, kw_only=True)
class _Joining:
    """One of the adapters that are trained together."""

    member: Member
    run: RunConfig
    data: RunData
    objective: Objective
    evaluator: Evaluator | None
    batch: Sequence[EncodedExample]
    """The micro-batch with most tokens."""
    accumulates: bool


def _estimate_together(config: TogetherConfig, nproc: int) -> Estimate:
    if nproc > 1:
        raise ConfigError(f"[[adapters]] are trained together in one process, and nproc = {nproc}: leave --nproc out")
    settings = config.shared.training
    # The passes are asked for tensors on the backbone's device: there, dry runs take place on the CPU.
    backbone = replace(empty_backbone(config.shared.backbone), device=CPU)
    model = backbone.model
    before = set(map(id, tensors_of(model)))
    shared = SharedBackbone(backbone, settings.logit_chunk)
    joining = [_join(shared, name, run) for name, run in config.runs.items()]
    examples = [item for one in joining for item in one.batch]

    dry = DryRun()
    with shared.together():
        parts = ModelParts.of(model, before, config.shared)
        dry.empty(model)
    with dry, shape_only_products(model, on_cpu=parts.on_cpu), activation_checkpointing(model, settings):
        shared.prepare(examples)
        trained = {one.member.name: _trained(shared, one.member) for one in joining}
        ranks = Alone(dry, [parameter for parameters in trained.values() for parameter in parameters])
        updates, optimizer, copies = [], 0, 0
        for one in joining:
            with shared.only(one.member):
                updates.append(optimizer_step(one.member.tuned, ranks, one.run))
            parameters = trained[one.member.name]
            states = state_bytes(one.run.training.optimizer, parameters, one.run.training)
            optimizer += states
            own = sum(parameter.nbytes for parameter in parameters)
            copies += copied_bytes(one.run, own, states, _num_steps(one.run, one.data), is_watched=True)

        def step() -> None:
            shares = [Share(member=one.member, examples=one.batch, micro_batch_size=len(one.batch)) for one in joining]
            with shared.together():
                shared.accumulate_gradients(shares)

        def evaluations() -> Iterator[Pass]:
            for one in joining:
                with shared.only(one.member):
                    held_out = one.data.held_out.examples
                    yield from evaluation_passes(
                        one.run, one.member.tuned.model, one.objective, held_out, one.evaluator
                    )

        peaks = find_peaks(
            dry,
            ranks,
            passes=[step],
            update=lambda: [update() for update in updates],
            evaluations=evaluations(),
            accumulates=any(one.accumulates for one in joining),
        )
    return Estimate.of(parts, optimizer, copies, peaks, MicroBatch.of(examples))


def _join(shared: SharedBackbone, name: str, run: RunConfig) -> _Joining:
    task = open_task(run, shared.backbone)
    data = open_data(run.data, shared.backbone, task.encode)
    adapter = _fresh(run.adapter)
    assert isinstance(adapter, LoraSettings), "checked with the configuration"
    evaluator = text_evaluator(task, run.evaluate, data.held_out.examples)
    member = shared.add(name, adapter, run.training.seed)
    batches, accumulates = _micro_batches(run, data, nproc=1)
    return _Joining(
        member=member,
        run=run,
        data=data,
        objective=task.objective(member.tuned),
        evaluator=evaluator,
        batch=batches[0],
        accumulates=accumulates,
    )


def _trained(shared: SharedBackbone, member: Member) -> list[nn.Parameter]:
    with shared.only(member):
        return list(trained_parameters(member.tuned.model).values())


def _pass(tuned: Tuned, objective: Objective, batch: Sequence[EncodedExample]) -> Pass:
    return lambda: objective.loss_sum(tuned.model, batch, CPU).backward()


def _fresh(settings: AdapterSettings) -> AdapterSettings:
    """An adapter of the same shapes, whose first numbers come from nowhere: there are none on the meta device."""
    unread = {"warm_start": None, "init": "default"}
    return settings.model_copy(update={name: value for name, value in unread.items() if hasattr(settings, name)})


def _num_steps(config: RunConfig, data: RunData) -> int:
    return count_steps(config.training, len(data.examples))


def _micro_batches(config: RunConfig, data: RunData, nproc: int) -> tuple[list[Sequence[EncodedExample]], bool]:
    """Of those that the run will really make, on any of its ranks, the costliest, most tokens first; and whether a step
    takes several."""
    settings = config.training
    plan = steps(
        data.examples,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_steps=_num_steps(config, data),
    )
    size = settings.micro_batch_size or settings.batch_size
    ranks = [Ranks(rank=rank, size=nproc) for rank in range(nproc)]
    most = 0

    def every_one() -> Iterator[Sequence[EncodedExample]]:
        nonlocal most
        for chosen in plan:
            for rank in ranks:
                parts = [part for part, _ in micro_batches(chosen, size, rank)]
                most = max(most, len(parts))
                yield from parts

    return largest(every_one(), packed=settings.packing), most > 1
