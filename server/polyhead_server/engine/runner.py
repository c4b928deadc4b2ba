"""Runs the backbone over one flattened batch. Owns the model and the KV pages; knows nothing of requests."""

from __future__ import annotations

import bisect
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from polyhead_core.backbone import Backbone
from polyhead_core.errors import BackboneError
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels import dispatch
from polyhead_core.kernels.draw import Draw
from polyhead_core.kernels.tables import AdapterTables
from polyhead_core.sites import SiteKind
from polyhead_server.engine import attention
from polyhead_server.engine.attention import AttentionFacts
from polyhead_server.engine.batch import BatchRow, StepBatch, build_batch
from polyhead_server.engine.fused_decoder import fuse_decoder, run_tree
from polyhead_server.engine.site_modules import CurrentStep, attach
from polyhead_server.engine.step_graphs import SEGMENT, SIZES, CudaRecorder, StepGraphs
from polyhead_server.kvcache.pool import KVPool, KVShape

logger = logging.getLogger(__name__)

WARM_UP_LIMIT_S = 180.0
"""After which a server listens, whatever has not been compiled yet."""


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
    def returns_early(self) -> bool:
        """Whether `forward` comes back before its logits are there, so that the caller can do something else."""
        return self.backbone.device.type == "cuda"

    @property
    def num_fused_layers(self) -> int:
        return 0 if self.fused is None else self.fused.num_layers

    def prepare(self, rows: Sequence[BatchRow], tables: AdapterTables) -> StepBatch:
        """The step's batch, on the host."""
        return build_batch(rows, tables, self.kv)

    def warm_up(
        self,
        max_rows: int,
        tables: AdapterTables,
        *,
        max_tokens: int,
        max_context: int,
        limit_s: float = WARM_UP_LIMIT_S,
    ) -> None:
        """Runs steps of the sizes that serving will meet, on CUDA, for an engine at rest: see _sizes_to_meet.

        Each compiles its kernels and measures its products, which takes minutes the first time on a machine, and decode
        steps are recorded. With adapters means at every linear layer but the head, so that a recording looks there for
        each adapter: two launches a layer's group of sites, which find nothing to do where it has no weights. Not
        covered: adapters on embedding, head and biases of norms, more logits in a step than rows (scores), and what is
        left when `limit_s` have passed or memory is short. That takes its time at its first request.
        """
        if self.backbone.device.type != "cuda" and self.graphs is None:
            return
        # Tokens are drawn on the host, by kernels that are compiled on first use.
        dispatch.draw([torch.zeros(1)], [Draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.0)])
        linear = frozenset(
            site.index for site in self.backbone.sites if site.kind is SiteKind.LINEAR and not site.is_head
        )
        num_tokens = self.kv.num_blocks * self.kv.shape.block_size
        context = min(max_context, self.backbone.max_position_embeddings, num_tokens)
        sizes = list(_sizes_to_meet(max_rows, max_tokens, context))
        deadline_s = time.monotonic() + limit_s
        for place, size in enumerate(sizes):
            if time.monotonic() > deadline_s:
                logger.warning("%d of %d sizes of steps are met before the first request", place, len(sizes))
                return
            batch = self.prepare(self._rows_of(size), tables)
            try:
                self.forward(replace(batch, active_sites=linear) if size.adapted else batch)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory for a step of %d tokens at the start: %s", batch.num_tokens, error)

    def _rows_of(self, size: _StepSize) -> list[BatchRow]:
        """Rows without an adapter over blocks that are nobody's."""
        num_blocks = -(-size.context // self.kv.shape.block_size)
        return [
            BatchRow(
                token_ids=[0] * size.tokens_a_row,
                start=0,
                block_ids=[(row + block) % self.kv.num_blocks for block in range(num_blocks)],
                slot=-1,
            )
            for row in range(size.rows)
        ]

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


@dataclass(frozen=True)
class _StepSize:
    rows: int
    tokens_a_row: int
    context: int
    """Tokens for which the block tables have room."""
    adapted: bool


def _sizes_to_meet(max_rows: int, max_tokens: int, max_context: int) -> Iterator[_StepSize]:
    """Each without adapters and with them, what most requests begin with first.

    Decodes of all SIZES up to `max_rows` over tables of one segment; prefills of 2, 4, 8 ... and `max_tokens` tokens;
    then the same decodes, and one prefill, over tables of two, four ... segments up to `max_context` tokens.
    """
    decodes = [*SIZES[: bisect.bisect_left(SIZES, max_rows) + 1], *([max_rows] if max_rows > SIZES[-1] else [])]
    prefills = [*(1 << power for power in range(1, max_tokens.bit_length()) if 1 << power < max_tokens), max_tokens]
    for adapted in (False, True):
        for rows in reversed(decodes):  # the largest first: smaller ones fit into the memory that it leaves
            yield _StepSize(rows, 1, min(SEGMENT, max_context), adapted)
        for tokens in prefills:
            rows = -(-tokens // max_context)
            yield _StepSize(rows, tokens // rows, min(tokens, max_context), adapted)
    context = SEGMENT
    while context < max_context:
        context *= 2
        for adapted in (False, True):
            for rows in reversed(decodes):
                yield _StepSize(rows, 1, min(context, max_context), adapted)
            yield _StepSize(1, 2, min(context, max_context), adapted)


@torch.inference_mode()
def probe_attention(backbone: Backbone) -> tuple[AttentionFacts, ...]:
    """What each layer asks of attention, seen by running one token through an attention function of our own.

    Raises BackboneError for a model whose attention does not go through transformers' attention interface: some
    architectures ignore it silently and would be computed without any KV cache.
    """
    seen: dict[int, AttentionFacts] = {}
    architecture = backbone.architecture  # transformers keeps `record` for good: it must not keep the backbone

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *_: Any, **settings: Any
    ) -> tuple[Tensor, None]:
        if key.shape != value.shape:
            raise BackboneError(f"{architecture} has keys and values of different widths: not supported")
        seen[int(module.layer_idx)] = AttentionFacts.of(query, key, settings)
        return query.transpose(1, 2), None

    name = "polyhead_probe"
    with _attention_function(backbone, name, record):
        token = torch.zeros(1, 1, dtype=torch.int64, device=backbone.device)
        backbone.model(input_ids=token, position_ids=token, use_cache=False)
    expected = int(backbone.model.config.num_hidden_layers)
    if sorted(seen) != list(range(expected)):
        raise BackboneError(
            f"{architecture} does not run its attention through transformers' attention interface "
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
