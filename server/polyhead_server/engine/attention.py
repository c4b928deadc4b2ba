"""Attention over the paged KV cache, as an attention function that transformers' models call by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from polyhead_core.kernels import dispatch
from polyhead_server.engine.batch import StepBatch

NAME = "polyhead_paged"
BATCH_ARGUMENT = "polyhead_batch"
"""The keyword under which a StepBatch travels through the model's forward to its attention layers."""


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """What one layer asks of attention."""

    heads: int
    kv_heads: int
    head_width: int
    scale: float
    sliding_window: int
    """Keys that a token sees, itself included; 0: all."""
    softcap: float
    """0: none."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, settings: Mapping[str, Any]) -> AttentionFacts:
        """From what transformers hands to an attention function: query [1, H, T, D], key [1, G, T, D], keywords."""
        scaling = settings.get("scaling")
        return cls(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_width=key.shape[3],
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            sliding_window=settings.get("sliding_window") or 0,
            softcap=settings.get("softcap") or 0.0,
        )


def register() -> None:
    """Makes the function known to transformers. No mask is built: the page tables say what a token may see."""
    AttentionInterface.register(NAME, paged_attention_forward)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def paged_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Writes this step's keys and values into their pages, then attends over the pages.

    query [1, H, T, D], key and value [1, G, T, D], already rotated; returns [1, T, H, D] and no weights.
    """
    batch: StepBatch = settings[BATCH_ARGUMENT]
    facts = AttentionFacts.of(query, key, settings)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = batch.kv.keys[layer], batch.kv.values[layer]
    dispatch.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, batch.slot_mapping)
    out_THD = dispatch.paged_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        batch.block_tables,
        batch.sequence,
        batch.positions,
        facts.scale,
        facts.sliding_window,
        facts.softcap,
        batch.key_offsets,
    )
    return out_THD.unsqueeze(0), None
