"""The parts of a run's memory, in bytes of tensors: the interpreter with its libraries, the data, and on a GPU the CUDA
context come on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn

from polyhead_core.int8 import Int8Linear
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.estimate.passes import Peaks


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The one of the run with most tokens."""

    num_rows: int
    num_tokens: int
    """Of each row, padding included."""
    num_labels: int

    @classmethod
    def of(cls, examples: Sequence[EncodedExample]) -> MicroBatch:
        return cls(
            num_rows=len(examples),
            num_tokens=max(item.width for item in examples),
            num_labels=sum(example.num_labels for example in examples),
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one rank: with parallel.strategy = fsdp and several ranks, of its shards.

    With parallel.cpu_offload, weights, adapter, optimizer and gradients are in host memory, and no part of the peak.
    With training.compile, activations are those of a run without it, which needs more: operators are not joined here.
    """

    weights: int
    """Of the backbone as it was loaded."""
    packed: int
    """A second copy of int8 weights, as the CPU's kernels read them."""
    adapter: int
    """What the method adds, with PiSSA and OLoRA a copy of where they started from, whole on every rank; of the weights
    that a full fine-tune trains there is no second copy."""
    optimizer: int
    copies: int
    """Of what is trained: the last good adapter and the one on trial, the best weights, a checkpoint on its way to the
    disk. They are in host memory, which is counted where the training is on the CPU."""
    gradients: int
    """What the optimizer's step finds."""
    activations: int
    """At the fullest moment of a step, all but the gradients that are there by then and what is gathered: what forward
    keeps for backward, logits, and what is held by the way."""
    gathered: int
    """fsdp, at that moment: what is whole. What is outside of layers, the layer that computes, the next or the last one
    in communication's buffers, and gradients before they are summed over the ranks."""
    evaluation: int
    """At the fullest moment of a held-out batch, with what is gathered for it."""
    published: int
    """fsdp: what the main rank makes whole at the end to save it, in host memory, which is counted where the training
    is on the CPU."""
    peak: int
    """The most that is held at once."""
    batch: MicroBatch

    @classmethod
    def of(
        cls,
        model: ModelParts,
        optimizer: int,
        copies: int,
        peaks: Peaks,
        batch: MicroBatch,
        *,
        offloaded: bool = False,
    ) -> Estimate:
        held = model.packed + copies
        step, update = peaks.step.total, peaks.update
        if offloaded:
            step, update = step - peaks.step.gradients, 0
        else:
            held += model.weights + model.adapter + optimizer
        return cls(
            weights=model.weights,
            packed=model.packed,
            adapter=model.adapter,
            optimizer=optimizer,
            copies=copies,
            gradients=peaks.gradients,
            activations=peaks.step.activations,
            gathered=peaks.step.gathered,
            evaluation=peaks.evaluation,
            published=model.published,
            peak=held + max(step, update, peaks.evaluation, model.published),
            batch=batch,
        )

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch"}


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Fields as Estimate's."""

    weights: int
    packed: int
    adapter: int
    published: int
    on_cpu: bool
    packed_at_once: dict[Int8Linear, int]
    """Bytes of a packed copy that a layer makes for one product alone: in shards."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        backbone_ids: set[int],
        config: RunConfig,
        num_shards: int = 1,
        *,
        saves_frozen: bool = False,
    ) -> ModelParts:
        """`model`: on the meta device, with the method's parameters in; `backbone_ids`: of the tensors that were there
        before them; `saves_frozen`: as Tuned has it."""
        sizes = {id(tensor): tensor.nbytes for tensor in tensors_of(model)}
        buffers = {id(buffer) for buffer in model.buffers()}
        shared = {key: size for key, size in sizes.items() if key in backbone_ids}
        replicated = sum(size for key, size in shared.items() if key in buffers)
        on_cpu = torch.device(config.backbone.device).type == "cpu"
        own_int8 = config.backbone.quantization == "int8"
        packed = {layer: _packed_bytes(layer) for layer in _int8_layers(model)} if on_cpu and own_int8 else {}
        whole = num_shards == 1
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        keeps_initial = getattr(config.adapter, "init", "default") in ("pissa", "olora")
        saved = [one for one in model.parameters() if one.requires_grad or saves_frozen]
        return cls(
            weights=replicated + (sum(shared.values()) - replicated) // num_shards,
            packed=sum(packed.values()) if whole else 0,
            adapter=(sum(sizes.values()) - sum(shared.values())) // num_shards + keeps_initial * trained,
            published=sum(one.nbytes for one in saved) if on_cpu and not whole else 0,
            on_cpu=on_cpu,
            packed_at_once={} if whole else packed,
        )


def copied_bytes(config: RunConfig, trained: int, optimizer: int, num_steps: int, is_watched: bool) -> int:
    """`trained`, `optimizer`: bytes of this rank; `is_watched`: divergence.LastGood copies the adapter."""
    if torch.device(config.backbone.device).type != "cpu":
        return 0
    keeps_best = config.training.evaluate_every > 0 and config.training.keep == "best"
    every = config.checkpoint.every_steps
    in_checkpoint = trained + optimizer + keeps_best * trained if every and num_steps >= every else 0
    return 2 * is_watched * trained + keeps_best * trained + in_checkpoint


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _int8_layers(model: nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def _packed_bytes(layer: Int8Linear) -> int:
    outliers = 0 if layer.outlier_columns is None else len(layer.outlier_columns)
    smoothed, biased = layer.input_scale is not None, layer.bias is not None
    return _packed_bytes_of(layer.in_features, layer.out_features, outliers, smoothed=smoothed, biased=biased)


@lru_cache
def _packed_bytes_of(width: int, out: int, outliers: int, *, smoothed: bool, biased: bool) -> int:
    """0 where there are no compiled kernels."""
    layer = Int8Linear(width, out)
    layer.set_int8(
        torch.zeros(out, width, dtype=torch.int8),
        torch.ones(out),
        torch.zeros(out) if biased else None,
        torch.ones(width) if smoothed else None,
        torch.arange(outliers) if outliers else None,
    )
    packed = layer.packed()
    return packed.num_bytes() if packed is not None else 0
