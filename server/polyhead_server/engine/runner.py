"""Runs the backbone over one flattened batch. Owns the model and the KV pages; knows nothing of requests."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from polyhead_core.backbone import Backbone
from polyhead_core.errors import BackboneError
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.engine import attention
from polyhead_server.engine.attention import AttentionFacts
from polyhead_server.engine.batch import BatchRow, StepBatch, build_batch
from polyhead_server.engine.fused_decoder import fuse_decoder, run_tree
from polyhead_server.engine.site_modules import CurrentStep, attach
from polyhead_server.engine.step_graphs import SIZES, CudaRecorder, StepGraphs
from polyhead_server.kvcache.pool import KVPool, KVShape


class Runner:
    """The swapped model and its KV pool. Not thread-safe: the engine's thread alone calls it."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        block_size: int,
        kv_cache_bytes: int,
        kv_dtype: torch.dtype | None = None,
        fuse: bool = True,
        record: bool = True,
    ) -> None:
        """`kv_dtype` None: bfloat16 with int8 weights, else the backbone's own. `fuse`: see fused_decoder.py;
        `record`: see step_graphs.py."""
        self.backbone = backbone
        self._step = CurrentStep()
        self.attention = probe_attention(backbone)
        if kv_dtype is None:
            kv_dtype = torch.bfloat16 if backbone.quantization == "int8" else backbone.dtype
        layers = tuple((layer.kv_heads, layer.head_width) for layer in self.attention)
        self.kv = KVPool(KVShape(layers=layers, block_size=block_size, dtype=kv_dtype), kv_cache_bytes, backbone.device)
        attention.register()
        backbone.model.set_attn_implementation(attention.NAME)
        attach(backbone.model, backbone.sites, self._step)
        _ = backbone.num_bytes  # counted before the weights change hands
        self.fused = fuse_decoder(backbone, self.attention, self.kv) if fuse else None
        for module in backbone.model.modules():
            if isinstance(module, Int8Linear) and not module.weight.is_meta:
                module.prepack()
        self.graphs: StepGraphs | None = None
        if record and backbone.device.type == "cuda" and self.fused is not None and self.fused.direct is not None:
            self.graphs = StepGraphs(self._logits, CudaRecorder(backbone.device), backbone.device)

    @property
    def num_fused_layers(self) -> int:
        return 0 if self.fused is None else self.fused.num_layers

    def prepare(self, rows: Sequence[BatchRow], tables: AdapterTables) -> StepBatch:
        """The step's batch, on the host."""
        return build_batch(rows, tables, self.kv)

    def warm_up(self, max_rows: int, tables: AdapterTables) -> None:
        """Records decode steps of up to `max_rows` rows before a request has to wait for it; for an engine at rest.

        On the way kernels are compiled and products measured, which takes minutes the first time on a machine.
        """
        if self.graphs is None:
            return
        sizes = SIZES[: bisect.bisect_left(SIZES, max_rows) + 1]
        for size in reversed(sizes):  # the largest first: smaller ones fit into the memory that it leaves
            blocks = [(row % self.kv.num_blocks,) for row in range(size)]
            rows = [BatchRow(token_ids=[0], start=0, block_ids=block, slot=-1) for block in blocks]
            self.forward(self.prepare(rows, tables))

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [L, vocab] float32 at the batch's logit rows; the KV of all its tokens is in the pages afterwards.

        They hold until the next call.
        """
        if self.graphs is not None and self.graphs.fits(batch):
            return self.graphs(batch)
        return self._logits(batch.to(self.backbone.device))

    def check_device(self) -> None:
        """Raises where the device is lost: every step would fail from now on."""
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)

    def _logits(self, batch: StepBatch) -> Tensor:
        self._step.batch = batch
        try:
            direct = None if self.fused is None else self.fused.direct
            logits = run_tree(self.backbone, batch) if direct is None else direct(batch)
        finally:
            self._step.batch = None
        return logits.float()


@torch.inference_mode()
def probe_attention(backbone: Backbone) -> tuple[AttentionFacts, ...]:
    """What each layer asks of attention, seen by running one token through an attention function of our own.

    Raises BackboneError for a model whose attention does not go through transformers' attention interface: some
    architectures ignore it silently and would be computed without any KV cache.
    """
    seen: dict[int, AttentionFacts] = {}

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        if key.shape != value.shape:
            raise BackboneError(f"{backbone.architecture} has keys and values of different widths: not supported")
        seen[int(module.layer_idx)] = AttentionFacts.of(query, key, settings)
        return query.transpose(1, 2), None

    name = "polyhead_probe"
    with _attention_function(backbone, name, record):
        token = torch.zeros(1, 1, dtype=torch.int64, device=backbone.device)
        backbone.model(input_ids=token, position_ids=token, use_cache=False)
    expected = int(backbone.model.config.num_hidden_layers)
    if sorted(seen) != list(range(expected)):
        raise BackboneError(
            f"{backbone.architecture} does not run its attention through transformers' attention interface "
            f"({len(seen)} of {expected} layers did), so it cannot be served"
        )
    return tuple(seen[layer] for layer in range(expected))


@contextlib.contextmanager
def _attention_function(backbone: Backbone, name: str, function: Any) -> Iterator[None]:
    previous = backbone.model.config._attn_implementation
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    backbone.model.set_attn_implementation(name)
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(previous)
