"""The tree that a run would load, every tensor of its type and shape on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from polyhead_core.backbone import Backbone, resolve_source
from polyhead_core.backbone.calibrate import MAX_OUTLIER_COLUMNS
from polyhead_core.backbone.checkpoint import CheckpointReader
from polyhead_core.backbone.embedding import CastEmbedding
from polyhead_core.backbone.load import empty_model, replace_module
from polyhead_core.int8 import Int8Linear
from polyhead_core.paths import default_cache_dir
from polyhead_trainer.backbones import check_loadable, compute_dtype, is_encoder_decoder
from polyhead_trainer.config import BackboneSection
from polyhead_trainer.estimate.empty_nf4 import EmptyNf4Linear


def empty_backbone(settings: BackboneSection) -> Backbone:
    """Raises BackboneError, ConfigError."""
    directory = resolve_source(settings.source, settings.cache_dir or default_cache_dir())
    check_loadable(settings, directory)
    compute = compute_dtype(settings)
    return Backbone(
        model=_empty_tree(directory, settings.quantization, compute).eval().requires_grad_(False),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        source=settings.source,
        directory=directory,
        fingerprint="",
        quantization=settings.quantization,
        dtype=compute,
        device=torch.device("meta"),
    )


def _empty_tree(directory: Path, quantization: str, compute: torch.dtype) -> PreTrainedModel:
    if is_encoder_decoder(directory):
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(directory))
    else:
        model = empty_model(directory)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if quantization != "none" and type(module) is nn.Linear and (quantization == "int8" or module is not head):
            if quantization == "nf4":
                layer: nn.Module = EmptyNf4Linear(module, compute)
            else:
                layer = _int8_layer(module, calibrated=quantization == "int8")
            replace_module(model, path, layer)
    if quantization == "int8":
        _keep_table(model, directory, compute)
        return model
    others = [module for module in model.modules() if not any(True for _ in module.children())]
    for module in [model] if quantization == "none" else others:
        if not isinstance(module, (Int8Linear, EmptyNf4Linear)):
            nn.Module.to(module, compute)
    _tie(model)
    return model


def _keep_table(model: PreTrainedModel, directory: Path, compute: torch.dtype) -> None:
    """As the conversion to int8 does: the embedding in its own type, or in bfloat16 for float32."""
    table: Any = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is table)
    dtype = CheckpointReader(directory).read(f"{path}.weight").dtype
    kept = torch.bfloat16 if dtype == torch.float32 else dtype
    weight = torch.empty(table.weight.shape, dtype=kept, device="meta")
    replace_module(model, path, CastEmbedding(weight, compute, padding_idx=table.padding_idx))


def _tie(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        model.tie_weights()
        return
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
