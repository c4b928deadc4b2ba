"""Puts an estimate together: the model on the meta device, then dry runs of the costliest batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

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
)
from polyhead_trainer.methods import Tuned, trained_parameters
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
    data = open_data(config.data, backbone.tokenizer, task.encode)
    held_out, pad_id = data.held_out.examples, padding_id(backbone.tokenizer)
    batches, accumulates = _micro_batches(config, data, nproc)

    before = set(map(id, tensors_of(backbone.model)))
    tuned = methods.tune(task.backbone, _fresh(config.adapter), config.training.seed)
    model = tuned.model
    parts = ModelParts.of(model, before, config, num_shards)
    dry = DryRun()
    dry.empty(model)
    with dry, shape_only_products(model), activation_checkpointing(model, config.training):
        if config.training.packing:
            prepare_packing(model, batches[0], pad_id)
        objective = task.objective(tuned)
        parameters = list(trained_parameters(model).values())
        dry.count_gradients(parameters, num_shards)
        model.train()
        peaks = find_peaks(
            dry,
            parameters,
            passes=[_pass(tuned, objective, batch) for batch in batches],
            update=optimizer_step(tuned, config),
            evaluations=evaluation_passes(config, model, objective, held_out, pad_id),
            accumulates=accumulates,
        )
    optimizer = state_bytes(config.training.optimizer, parameters, config.training) // num_shards
    trained = sum(parameter.nbytes for parameter in parameters) // num_shards
    copies = copied_bytes(config, trained, optimizer, _num_steps(config, data), tuned.is_adapter and nproc == 1)
    offloaded = config.parallel.cpu_offload and num_shards > 1
    return Estimate.of(parts, optimizer, copies, peaks, MicroBatch.of(batches[0]), offloaded=offloaded)


def _estimate_together(config: TogetherConfig, nproc: int) -> Estimate:
    if nproc > 1:
        raise ConfigError(f"[[adapters]] are trained together in one process, and nproc = {nproc}: leave --nproc out")
    settings = config.shared.training
    # The passes are asked for tensors on the backbone's device: there, dry runs take place on the CPU.
    backbone = dataclasses.replace(empty_backbone(config.shared.backbone), device=CPU)
    model = backbone.model
    before = set(map(id, tensors_of(model)))
    shared = SharedBackbone(backbone, settings.logit_chunk)
    members: list[tuple[Member, RunConfig, Objective, RunData]] = []
    shares, accumulates = [], False
    for name, run in config.runs.items():
        task = open_task(run, backbone)
        data = open_data(run.data, backbone.tokenizer, task.encode)
        adapter = _fresh(run.adapter)
        assert isinstance(adapter, LoraSettings), "checked with the configuration"
        member = shared.add(name, adapter, run.training.seed)
        batches, several = _micro_batches(run, data, nproc)
        members.append((member, run, task.objective(member.tuned), data))
        shares.append(Share(member=member, examples=batches[0], micro_batch_size=len(batches[0])))
        accumulates = accumulates or several

    dry = DryRun()
    with shared.together():
        parts = ModelParts.of(model, before, config.shared, num_shards=1)
        dry.empty(model)
    with dry, shape_only_products(model), activation_checkpointing(model, settings):
        shared.prepare([example for share in shares for example in share.examples])
        parameters, updates, optimizer, copies = [], [], 0, 0
        for member, run, _, data in members:
            with shared.only(member):
                own = list(trained_parameters(member.tuned.model).values())
                updates.append(optimizer_step(member.tuned, run))
            parameters += own
            states = state_bytes(run.training.optimizer, own, run.training)
            optimizer += states
            trained = sum(parameter.nbytes for parameter in own)
            copies += copied_bytes(run, trained, states, _num_steps(run, data), is_watched=True)
        dry.count_gradients(parameters)

        def step() -> None:
            with shared.together():
                shared.accumulate_gradients(shares)

        pad_id = padding_id(backbone.tokenizer)

        def evaluations() -> Iterator[Pass]:
            for member, run, objective, data in members:
                with shared.only(member):
                    examples = data.held_out.examples
                    yield from evaluation_passes(run, member.tuned.model, objective, examples, pad_id)

        peaks = find_peaks(
            dry,
            parameters,
            passes=[step],
            update=lambda: [update() for update in updates],
            evaluations=evaluations(),
            accumulates=accumulates,
        )
    return Estimate.of(
        parts, optimizer, copies, peaks, MicroBatch.of([item for share in shares for item in share.examples])
    )


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
    found = [[part for part, _ in micro_batches(chosen, size, rank)] for chosen in plan for rank in ranks]
    return largest([part for parts in found for part in parts]), any(len(parts) > 1 for parts in found)
