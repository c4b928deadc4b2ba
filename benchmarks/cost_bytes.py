"""Bytes by counting: of a backbone in bfloat16 and in Polyhead's int8, and of adapters on it, for any shape of model.

Nothing is loaded: the shape stands on the meta device, and Polyhead's own site map lists what an adapter can touch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from serving_workload import TARGETS
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from polyhead_core.backbone.calibrate import MAX_OUTLIER_COLUMNS
from polyhead_core.backbone.model import site_map
from polyhead_core.kernels.tables import RANKS_PER_PAGE
from polyhead_core.sites import SiteKind

BF16_BYTES, FLOAT32_BYTES, INT64_BYTES = 2, 4, 8

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which layers of the blocks a LoRA adapter touches, and with which rank."""

    name: str
    rank: int
    targets: tuple[str, ...]


RECIPES = (
    Recipe(name="rank 8 on q, v", rank=8, targets=("q_proj", "v_proj")),
    Recipe(name="rank 16 on all linear", rank=16, targets=tuple(TARGETS)),
)


@dataclass(frozen=True, kw_only=True)
class ShapeBytes:
    parameters: int
    bf16: int
    int8: int
    """As Polyhead holds it: int8 linear layers with their scales and outlier columns, the head apart from a tied
    embedding, the embedding in bfloat16, norms in float32."""
    adapters: dict[str, int]
    """By recipe: bytes in the device pool, in bfloat16, whole rank pages."""


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def shape_bytes(config: PreTrainedConfig) -> ShapeBytes:
    model = empty_model(config)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    return ShapeBytes(
        parameters=parameters,
        bf16=parameters * BF16_BYTES,
        int8=_int8_bytes(model),
        adapters={recipe.name: adapter_bytes(model, recipe.rank, recipe.targets) for recipe in RECIPES},
    )


def adapter_bytes(model: PreTrainedModel, rank: int, targets: Collection[str]) -> int:
    padded = -(-rank // RANKS_PER_PAGE) * RANKS_PER_PAGE
    touched = [site for site in site_map(model) if site.path.rpartition(".")[2] in targets]
    return sum(padded * (site.in_features + site.out_features) for site in touched) * BF16_BYTES


def _int8_bytes(model: PreTrainedModel) -> int:
    linear = [site for site in site_map(model) if site.kind is SiteKind.LINEAR]
    embedding: Any = model.get_input_embeddings()
    total = sum(_int8_layer_bytes(site.in_features, site.out_features) for site in linear)
    total += int(embedding.weight.numel()) * BF16_BYTES
    total += sum(p.numel() for p in model.parameters() if p.dim() < 2) * FLOAT32_BYTES
    return total + sum(buffer.nbytes for buffer in model.buffers())


def _int8_layer_bytes(in_features: int, out_features: int) -> int:
    columns = min(MAX_OUTLIER_COLUMNS, in_features // 16)
    scales = (in_features + out_features) * FLOAT32_BYTES
    return in_features * out_features + scales + columns * (out_features + INT64_BYTES)
