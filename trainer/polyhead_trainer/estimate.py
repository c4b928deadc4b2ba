"""`trainer estimate`: what a run will need per rank, part by part, before anything is loaded.

The model is built on the meta device; what backward needs is counted by running the forward pass on fake tensors.
Weights, adapter and optimizer are tested against real runs; the activations and the peak have not been compared with
a measured peak yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer, PreTrainedModel

from polyhead_core.backbone import Backbone, resolve_source
from polyhead_core.backbone.calibrate import MAX_OUTLIER_COLUMNS
from polyhead_core.backbone.checkpoint import CheckpointReader
from polyhead_core.backbone.embedding import CastEmbedding
from polyhead_core.backbone.load import empty_model, replace_module
from polyhead_core.errors import ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_core.paths import default_cache_dir
from polyhead_trainer import methods
from polyhead_trainer.activation_checkpointing import activation_checkpointing
from polyhead_trainer.batching import steps
from polyhead_trainer.config import BackboneSection, ParallelSection, RunConfig, TrainingSection
from polyhead_trainer.data import EncodedExample, ExampleStream, encode
from polyhead_trainer.decoder_layers import transformer_layers
from polyhead_trainer.evaluate import BATCH_SIZE, WINDOW_TOKENS
from polyhead_trainer.optimizers import state_bytes
from polyhead_trainer.parallel import Ranks, check_possible, layer_class, micro_batches
from polyhead_trainer.schedule import count_steps
from polyhead_trainer.training_data import open_data

FLOAT32_BYTES = 4
LOGIT_COPIES = 3
"""float32 [labels, vocabulary] held at once: the logits, their log-softmax, and the gradient of one of them."""
EVALUATION_LOGIT_COPIES = 2
"""Without a backward pass: the logits and their log-softmax."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The most expensive one of the run."""

    num_rows: int
    num_tokens: int
    """Of each row, padding included."""
    num_labels: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one rank: with parallel.strategy = fsdp and several ranks, of its shards."""

    weights: int
    adapter: int
    """What the method adds; of the weights that a full fine-tune trains there is no second copy."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass of the largest micro-batch keeps for the backward pass."""
    logits: int
    """Of that micro-batch, their softmax and gradient included."""
    evaluation_logits: int
    """Of the largest evaluation batch, when gradients and optimizer states may be there as well."""
    gathered: int = 0
    """fsdp: what is whole while the model computes: what is outside of layers, and two layers, the next one being
    gathered while one computes."""
    batch: MicroBatch

    def parts(self) -> dict[str, int]:
        names = (
            "weights",
            "adapter",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "evaluation_logits",
            "gathered",
            "peak",
        )
        return {name: getattr(self, name) for name in (*names, "peak")}

    @property
    def held(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.gathered

    @property
    def training_peak(self) -> int:
        return self.held + self.gradients + self.activations + self.logits

    @property
    def peak(self) -> int:
        return max(self.training_peak, self.held + self.evaluation_logits)


def estimate(config: RunConfig, *, nproc: int = 1) -> Estimate:
    """Raises ConfigError, BackboneError, DataError."""
    if config.task != "completion":
        raise ConfigError(f"task = {config.task}: only runs with task = completion can be estimated")
    check_possible(config, Ranks(size=nproc, device=torch.device(config.backbone.device)))
    num_shards = nproc if config.parallel.strategy == "fsdp" else 1
    cache = config.backbone.cache_dir or default_cache_dir()
    directory = resolve_source(config.backbone.source, cache)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = open_data(config.data, tokenizer, encode)
    batch = largest_micro_batch(config, data.examples, nproc)
    model = empty_backbone(directory, config.backbone)
    buffers = sum({id(buffer): buffer.nbytes for buffer in model.buffers()}.values())
    untouched = _num_bytes(model)
    weights = buffers + (untouched - buffers) // num_shards
    backbone = _as_backbone(model, directory, tokenizer, config)
    wrapped = methods.tune(backbone, config.adapter, config.training.seed).model
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    vocabulary = int(model.config.vocab_size)
    training = config.training
    logits = batch.num_labels * vocabulary
    held_out_rows = _evaluation_rows(config, data.held_out.examples)
    return Estimate(
        weights=weights,
        adapter=(_num_bytes(wrapped) - untouched) // num_shards,
        gradients=sum(parameter.nbytes for parameter in parameters) // num_shards,
        optimizer=state_bytes(training.optimizer, parameters, training) // num_shards,
        activations=activation_bytes(wrapped, batch, training),
        logits=LOGIT_COPIES * min(logits, training.logit_chunk or logits) * FLOAT32_BYTES,
        evaluation_logits=EVALUATION_LOGIT_COPIES * held_out_rows * vocabulary * FLOAT32_BYTES,
        gathered=_gathered_bytes(wrapped, config.parallel) if num_shards > 1 else 0,
        batch=batch,
    )


def _gathered_bytes(model: nn.Module, settings: ParallelSection) -> int:
    layers = [module for module in model.modules() if type(module) is layer_class(model, settings.wrap)]
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {id(parameter): parameter.nbytes for parameter in model.parameters() if id(parameter) not in in_layers}
    largest = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers)
    return sum(outside.values()) + min(2, len(layers)) * largest


def largest_micro_batch(
    config: RunConfig, examples: list[EncodedExample] | ExampleStream, nproc: int = 1
) -> MicroBatch:
    """Of the batches that the run will really make, on any of its ranks, the one with most tokens."""
    settings = config.training
    plan = steps(
        examples,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_steps=count_steps(settings, len(examples)),
    )
    size = settings.micro_batch_size or settings.batch_size
    ranks = [Ranks(rank=rank, size=nproc) for rank in range(nproc)]
    parts = (part for chosen in plan for rank in ranks for part, _ in micro_batches(chosen, size, rank))
    largest = max(parts, key=lambda part: len(part) * max(map(len, part)))
    return MicroBatch(
        num_rows=len(largest),
        num_tokens=max(map(len, largest)),
        num_labels=sum(example.num_labels for example in largest),
    )


def _evaluation_rows(config: RunConfig, held_out: list[EncodedExample]) -> int:
    measured = sorted(held_out[: config.evaluate.max_examples or None], key=len)
    chunks = [measured[at : at + BATCH_SIZE] for at in range(0, len(measured), BATCH_SIZE)]
    rows = max(sum(example.num_labels for example in chunk) for chunk in chunks)
    general = min(WINDOW_TOKENS, config.evaluate.general_tokens) if config.evaluate.general_text else 0
    return max(rows, general)


def empty_backbone(directory: Path, settings: BackboneSection) -> PreTrainedModel:
    """The tree that the run would load, every tensor of its type and shape on the meta device."""
    model = empty_model(directory)
    compute = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if settings.dtype == "auto" and settings.device != "cpu":
        compute = torch.bfloat16
    if settings.quantization == "none":
        nn.Module.to(model, compute)
        _tie(model)
        return model
    own, head = settings.quantization == "int8", model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and (own or module is not head):
            replace_module(model, path, _int8_layer(module, calibrated=own))
    if own:
        stored = CheckpointReader(directory)
        table: Any = model.get_input_embeddings()
        path = next(path for path, module in model.named_modules() if module is table)
        dtype = stored.read(f"{path}.weight").dtype
        # As the conversion does: a float32 table is kept in bfloat16.
        kept = torch.bfloat16 if dtype == torch.float32 else dtype
        weight = torch.empty(table.weight.shape, dtype=kept, device="meta")
        replace_module(model, path, CastEmbedding(weight, compute, padding_idx=table.padding_idx))
    else:
        for module in model.modules():
            if not isinstance(module, Int8Linear) and not any(True for _ in module.children()):
                module.to(compute)
        _tie(model)
    return model


def _tie(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        table: Any = model.get_input_embeddings()
        head.weight = table.weight


def _int8_layer(module: nn.Linear, *, calibrated: bool) -> Int8Linear:
    rows, columns = module.out_features, module.in_features
    num_outliers = min(MAX_OUTLIER_COLUMNS, columns // 16) if calibrated else 0
    layer = Int8Linear(columns, rows, bias=module.bias is not None, device="meta")
    layer.set_int8(
        layer.weight.data,
        layer.SCB,
        None if module.bias is None else layer.bias.data,
        torch.empty(columns, device="meta") if calibrated else None,
        None,
    )
    if num_outliers:
        layer.outlier_columns = torch.empty(num_outliers, dtype=torch.int64, device="meta")
        layer.outlier_weight = torch.empty(rows, num_outliers, dtype=torch.int8, device="meta")
    return layer


def _as_backbone(model: PreTrainedModel, directory: Path, tokenizer: Any, config: RunConfig) -> Backbone:
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        source=config.backbone.source,
        directory=directory,
        fingerprint="",
        quantization=config.backbone.quantization,
        dtype=torch.float32,
        device=torch.device("meta"),
    )


def activation_bytes(model: nn.Module, batch: MicroBatch, settings: TrainingSection) -> int:
    """What forward keeps for backward; with activation checkpointing, one layer's more, as it is computed again."""
    with activation_checkpointing(model, settings):
        kept = saved_bytes(model, batch)
    if settings.activation_checkpointing == "none":
        return kept
    return kept + saved_bytes(model, batch) // len(transformer_layers(model))


def saved_bytes(model: nn.Module, batch: MicroBatch) -> int:
    """Bytes of the distinct tensors that autograd keeps for a forward pass over `batch`, parameters apart."""
    with FakeTensorMode(allow_non_fake_inputs=True), _shape_only_products(model):
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            _to_fake(module, made)
        parameters = {tensor.untyped_storage()._cdata for tensor in _tensors(model)}
        storages: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                storages[storage._cdata] = storage
            return tensor

        model.train()
        ids = torch.zeros(batch.num_rows, batch.num_tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        del output
    return sum(storage.nbytes() for storage in storages.values())


def _to_fake(module: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Replaces parameters and buffers, a shared parameter by one that is shared as well."""
    for name, parameter in module.named_parameters(recurse=False):
        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
        replacement = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        module._parameters[name] = made.setdefault(id(parameter), replacement)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _shape_only_products(model: nn.Module) -> Iterator[None]:
    """Fake tensors have no numbers for the compiled kernels to read."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.__dict__["product"] = lambda x, width=layer.out_features: x.new_empty(*x.shape[:-1], width)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["product"]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _num_bytes(model: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(model)}.values())
