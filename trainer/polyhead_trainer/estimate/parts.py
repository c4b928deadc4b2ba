"""The parts of a run's memory, in bytes of tensors: the interpreter with its libraries, the data, and on a GPU the CUDA
context come on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn

from polyhead_core.int8 import Int8Linear
from polyhead_trainer.config import ParallelSection, RunConfig
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.estimate.passes import Peaks
from polyhead_trainer.parallel import layer_class


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
            num_tokens=max(map(len, examples)),
            num_labels=sum(example.num_labels for example in examples),
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one rank: with parallel.strategy = fsdp and several ranks, of its shards.

    With parallel.cpu_offload, weights, adapter, optimizer and gradients are in host memory, and no part of the peak.
    Activations are counted in backbone.dtype, which parallel.param_dtype may be smaller than.
    """

    weights: int
    """Of the backbone as it was loaded."""
    packed: int
    """A second copy of int8 weights, as the CPU's kernels read them."""
    adapter: int
    """What the method adds; of the weights that a full fine-tune trains there is no second copy."""
    optimizer: int
    copies: int
    """Of what is trained: the last good adapter and the one on trial, the best weights, a checkpoint on its way to the
    disk. They are in host memory, which is counted where the training is on the CPU."""
    gradients: int
    """What the optimizer's step finds."""
    activations: int
    """At the fullest moment of a step, all but the gradients that are there by then: what forward keeps for backward,
    logits, and what is held by the way."""
    evaluation: int
    """The same of a held-out batch."""
    gathered: int
    """fsdp: what is whole while the model computes: what is outside of layers, and two layers, the next one being
    gathered while one computes."""
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
        held = model.packed + model.gathered + copies
        passes, update = peaks.step.num_bytes, peaks.update
        if offloaded:
            passes, update = passes - peaks.step.gradients, 0
        else:
            held += model.weights + model.adapter + optimizer
        return cls(
            weights=model.weights,
            packed=model.packed,
            adapter=model.adapter,
            optimizer=optimizer,
            copies=copies,
            gradients=peaks.gradients,
            activations=peaks.step.num_bytes - peaks.step.gradients,
            evaluation=peaks.evaluation,
            gathered=model.gathered,
            peak=held + max(passes, update, peaks.evaluation),
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
    gathered: int

    @classmethod
    def of(cls, model: nn.Module, backbone_ids: set[int], config: RunConfig, num_shards: int) -> ModelParts:
        """`model`: on the meta device, with the method's parameters in; `backbone_ids`: of the tensors that were there
        before them."""
        sizes = {id(tensor): tensor.nbytes for tensor in tensors_of(model)}
        buffers = {id(buffer) for buffer in model.buffers()}
        shared = {key: size for key, size in sizes.items() if key in backbone_ids}
        replicated = sum(size for key, size in shared.items() if key in buffers)
        on_cpu = torch.device(config.backbone.device).type == "cpu"
        own_int8 = config.backbone.quantization == "int8"
        packed = [_packed_bytes(layer) for layer in _int8_layers(model)] if on_cpu and own_int8 else []
        whole = num_shards == 1
        return cls(
            weights=replicated + (sum(shared.values()) - replicated) // num_shards,
            packed=sum(packed) if whole else 0,
            adapter=(sum(sizes.values()) - sum(shared.values())) // num_shards,
            # In shards, a layer is packed for one product alone.
            gathered=0 if whole else _gathered_bytes(model, config.parallel) + max(packed, default=0),
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


def _gathered_bytes(model: nn.Module, settings: ParallelSection) -> int:
    layers = [module for module in model.modules() if type(module) is layer_class(model, settings.wrap)]
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {id(one): _gathered(one, settings) for one in model.parameters() if id(one) not in in_layers}
    largest = max(sum(_gathered(parameter, settings) for parameter in layer.parameters()) for layer in layers)
    return sum(outside.values()) + min(2, len(layers)) * largest


def _gathered(parameter: Tensor, settings: ParallelSection) -> int:
    if settings.param_dtype is None or not parameter.is_floating_point():
        return parameter.nbytes
    dtype: torch.dtype = getattr(torch, settings.param_dtype)
    return parameter.numel() * dtype.itemsize


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
