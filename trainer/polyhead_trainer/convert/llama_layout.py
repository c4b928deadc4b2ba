"""How Meta lays Llama's tensors out, and how transformers does: names, shapes, model-parallel splits, rotary order.

Shapes: H hidden, O output, I input. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

EmbeddingSplit = Literal["width", "vocabulary"]

FIRST_LARGE_VOCABULARY = 100_000
"""From Llama 3 on (128,256 tokens) Meta's ranks share the embedding by rows; before (32,000), by columns."""

COMPUTED = ("rope.freqs",)
"""Tensors of Meta's files that hold nothing but what params.json says: not converted."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    feed_forward: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def embedding_split(self) -> EmbeddingSplit:
        return "vocabulary" if self.vocabulary >= FIRST_LARGE_VOCABULARY else "width"


@dataclass(frozen=True, kw_only=True)
class LlamaTensor:
    """One weight under both names."""

    meta: str
    hugging_face: str
    shape: tuple[int, ...]
    split: int | None
    """The dimension that model-parallel ranks share; None: every rank holds all of it."""
    rotary_heads: int = 0
    """Number of heads whose rows stand in rotary order; 0: the rows are the same in both layouts."""

    def shard_shape(self, num_shards: int) -> tuple[int, ...]:
        return tuple(
            size // num_shards if dimension == self.split else size for dimension, size in enumerate(self.shape)
        )


def llama_tensors(shape: LlamaShape, embedding_split: EmbeddingSplit) -> Iterator[LlamaTensor]:
    h, kv = shape.hidden, shape.num_kv_heads * shape.head_dim
    yield LlamaTensor(
        meta="tok_embeddings.weight",
        hugging_face="model.embed_tokens.weight",
        shape=(shape.vocabulary, h),
        split=0 if embedding_split == "vocabulary" else 1,
    )
    for layer in range(shape.num_layers):
        rows: list[tuple[str, str, tuple[int, ...], int | None, int]] = [
            ("attention_norm", "input_layernorm", (h,), None, 0),
            ("attention.wq", "self_attn.q_proj", (h, h), 0, shape.num_heads),
            ("attention.wk", "self_attn.k_proj", (kv, h), 0, shape.num_kv_heads),
            ("attention.wv", "self_attn.v_proj", (kv, h), 0, 0),
            ("attention.wo", "self_attn.o_proj", (h, h), 1, 0),
            ("ffn_norm", "post_attention_layernorm", (h,), None, 0),
            ("feed_forward.w1", "mlp.gate_proj", (shape.feed_forward, h), 0, 0),
            ("feed_forward.w3", "mlp.up_proj", (shape.feed_forward, h), 0, 0),
            ("feed_forward.w2", "mlp.down_proj", (h, shape.feed_forward), 1, 0),
        ]
        for meta, hugging_face, full, split, heads in rows:
            yield LlamaTensor(
                meta=f"layers.{layer}.{meta}.weight",
                hugging_face=f"model.layers.{layer}.{hugging_face}.weight",
                shape=full,
                split=split,
                rotary_heads=heads,
            )
    yield LlamaTensor(meta="norm.weight", hugging_face="model.norm.weight", shape=(h,), split=None)
    yield LlamaTensor(meta="output.weight", hugging_face="lm_head.weight", shape=(shape.vocabulary, h), split=0)


def rotary_halves(pairs_OI: Tensor, num_heads: int) -> Tensor:
    """Meta rotates neighbours (2j, 2j + 1) of a head, transformers (j, j + head_dim / 2): Meta's order into the other.

    On all heads or on any whole heads of them: no row leaves its head.
    """
    rows, columns = pairs_OI.shape
    return pairs_OI.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def rotary_pairs(halves_OI: Tensor, num_heads: int) -> Tensor:
    """The inverse of rotary_halves."""
    rows, columns = halves_OI.shape
    return halves_OI.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def feed_forward_width(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    """The inner width that Meta's model code derives from params.json."""
    width = int(2 * 4 * hidden / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)
