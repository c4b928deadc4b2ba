"""Builds a backbone tensor by tensor on the meta device, so that host memory never holds more than one copy of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polyhead_core.backbone.checkpoint import CheckpointReader, fingerprint, read_json
from polyhead_core.backbone.convert import OWN_QUANT_METHOD, int8_directory, weight_name
from polyhead_core.backbone.embedding import CastEmbedding
from polyhead_core.backbone.host_memory import large_blocks_apart
from polyhead_core.backbone.model import Backbone
from polyhead_core.backbone.source import DEFAULT_SOURCE, resolve_source
from polyhead_core.backbone.typed_copy import typed_directory
from polyhead_core.devices import check_device
from polyhead_core.errors import BackboneError, ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_core.paths import default_cache_dir

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_backbone(
    source: str = DEFAULT_SOURCE,
    *,
    quantization: str = "int8",
    dtype: str = "auto",
    device: str = "cpu",
    cache_dir: Path | None = None,
    calibrate: bool = True,
    shared: bool = False,
) -> Backbone:
    """Loads a backbone, frozen and in evaluation mode.

    `source`: `default`, a Hugging Face directory (an int8 checkpoint that bitsandbytes saved included), a .gguf file or
    a hub id. `quantization`: `int8` (converted and calibrated once, then cached; `calibrate=False` gives plain W8A8) or
    `none`. `dtype`: of activations; auto is float32 on the CPU, bfloat16 elsewhere. `shared`: on the CPU, weights are
    pages of their file, which processes share; a cached copy of it, where it has them in another type than `dtype`.
    Raises BackboneError, ConfigError.
    """
    if quantization not in ("int8", "none"):
        raise ConfigError(f"quantization = {quantization!r}: expected int8 or none")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: expected auto, {' or '.join(DTYPES)}")
    cache = cache_dir or default_cache_dir()
    check_device(device, "device")
    target = torch.device(device)
    compute = DTYPES[("float32" if target.type == "cpu" else "bfloat16") if dtype == "auto" else dtype]
    with large_blocks_apart():
        directory = resolve_source(source, cache)
        identity = fingerprint(directory, cache)
        weights = directory
        if is_int8_checkpoint(directory):
            if quantization == "none":
                raise ConfigError(f"backbone {source!r} is saved in int8: serve it with quantization = int8")
        elif quantization == "int8":
            weights = int8_directory(directory, identity, cache, calibrate=calibrate)
        elif shared:
            weights = typed_directory(directory, identity, compute, cache)
        model = load_model(directory, weights, compute, target, quantized=quantization == "int8")
    return Backbone(
        model=model,
        tokenizer=_load_tokenizer(directory),
        source=source,
        directory=directory,
        fingerprint=identity,
        quantization=quantization,
        dtype=compute,
        device=target,
    )


def is_int8_checkpoint(directory: Path) -> bool:
    """Whether the directory holds LLM.int8 tensors, plain or calibrated; other quantisations raise BackboneError."""
    settings = read_json(directory / "config.json").get("quantization_config")
    if settings is None:
        return False
    if not isinstance(settings, dict):
        raise BackboneError(f"{directory / 'config.json'}: quantization_config = {settings!r:.100} is no object")
    if settings.get("load_in_8bit") or settings.get("quant_method") == OWN_QUANT_METHOD:
        return True
    raise BackboneError(
        f"{directory} is quantised with {settings.get('quant_method')!r}: expected unquantised weights or LLM.int8"
    )


def _load_tokenizer(directory: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"{directory} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise BackboneError(f"{directory} has only a slow tokenizer: expected tokenizer.json")
    return tokenizer


def empty_model(directory: Path) -> PreTrainedModel:
    """The model's tree with parameters on the meta device and real buffers."""
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BackboneError(f"cannot read {directory / 'config.json'}: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).partition("\n")[0]  # transformers goes on with the names of all architectures
        raise BackboneError(f"{directory} is not a decoder-only language model: {reason}") from error
    model.requires_grad_(False)
    model.eval()
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:
            raise BackboneError(f"cannot read {directory / 'generation_config.json'}: {error}") from error
    return model  # type: ignore[no-any-return]


def load_model(
    directory: Path, weights: Path, dtype: torch.dtype, device: torch.device, *, quantized: bool
) -> PreTrainedModel:
    """Fills the tree that `directory` configures with `weights`: linear layers as int8 when `quantized`, else `dtype`.

    What a cached directory of weights says of configuration and generation is not read: the source may have changed.

    Raises BackboneError for tensors that are missing, superfluous or of another shape.
    """
    model = empty_model(directory)
    reader = CheckpointReader(weights, model)
    used: set[str] = set()
    for path, module in list(model.named_modules()):
        if quantized and type(module) is nn.Linear and f"{path}.SCB" in reader:
            replace_module(model, path, _read_int8(reader, path, module, device, used))
        elif quantized and type(module) is nn.Linear:
            replace_module(model, path, _quantise(reader, model, path, module, device, used))
        elif type(module) is nn.Embedding and quantized:
            replace_module(model, path, _read_embedding(reader, path, module, dtype, device, used))
        else:
            _read_parameters(reader, path, module, dtype, device, used)
    if getattr(model.config, "tie_word_embeddings", False):
        _tie(model, quantized)
    _check_complete(model, reader, used, weights)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def replace_module(model: nn.Module, path: str, replacement: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, replacement)


def _take(reader: CheckpointReader, name: str, shape: torch.Size, used: set[str]) -> Tensor:
    tensor = reader.read(name)
    if tensor.shape != shape:
        raise BackboneError(f"{name} in {reader.directory} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    used.add(name)
    return tensor


def _read_parameters(
    reader: CheckpointReader, path: str, module: nn.Module, dtype: torch.dtype, device: torch.device, used: set[str]
) -> None:
    tensors = [*module.named_parameters(recurse=False), *_persistent_buffers(module)]
    for name, tensor in tensors:
        full = f"{path}.{name}"
        if full not in reader:
            continue
        loaded = _take(reader, full, tensor.shape, used)
        loaded = loaded.to(device, dtype if loaded.is_floating_point() else loaded.dtype)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(loaded, requires_grad=False)
        else:
            module._buffers[name] = loaded


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = module.named_buffers(recurse=False)
    return [(name, buffer) for name, buffer in buffers if name not in module._non_persistent_buffers_set]


def _read_int8(
    reader: CheckpointReader, path: str, module: nn.Linear, device: torch.device, used: set[str]
) -> Int8Linear:
    layer = Int8Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")

    def optional(name: str, shape: torch.Size) -> Tensor | None:
        full = f"{path}.{name}"
        return _take(reader, full, shape, used).to(device) if full in reader else None

    columns_name = f"{path}.outlier_columns"
    columns = reader.read(columns_name).to(device) if columns_name in reader else None
    used.update({columns_name, f"{path}.weight_format"})
    layer.set_int8(
        _take(reader, f"{path}.weight", module.weight.shape, used).to(device),
        _take(reader, f"{path}.SCB", torch.Size([module.out_features]), used).to(device),
        None if module.bias is None else optional("bias", module.bias.shape),
        optional("input_scale", torch.Size([module.in_features])),
        columns,
    )
    layer.eval()
    return layer


def _quantise(
    reader: CheckpointReader, model: PreTrainedModel, path: str, module: nn.Linear, device: torch.device, used: set[str]
) -> Int8Linear:
    """A layer that the checkpoint keeps in float: by default bitsandbytes leaves out the head, tied or not."""
    weight = _take(reader, weight_name(reader, model, path), module.weight.shape, used)
    if not weight.is_floating_point():
        raise BackboneError(f"{path}.weight in {reader.directory} is {weight.dtype} without its scales, {path}.SCB")
    bias = None if module.bias is None else _take(reader, f"{path}.bias", module.bias.shape, used).to(device)
    layer = Int8Linear.from_weight(weight.to(device), bias)
    layer.eval()
    return layer


def _read_embedding(
    reader: CheckpointReader, path: str, module: nn.Embedding, dtype: torch.dtype, device: torch.device, used: set[str]
) -> CastEmbedding:
    weight = _take(reader, f"{path}.weight", module.weight.shape, used).to(device)
    return CastEmbedding(weight, dtype, padding_idx=module.padding_idx)


def _tie(model: PreTrainedModel, quantized: bool) -> None:
    """A tied head shares the embedding, unless int8 gave it weights of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not quantized and head is not None and head.weight.is_meta:
        head.weight = embedding.weight


def _check_complete(model: PreTrainedModel, reader: CheckpointReader, used: set[str], directory: Path) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise BackboneError(f"{directory} lacks {len(missing)} tensors, {', '.join(missing[:5])} among them")
    check_none_is_left(model, reader, used)


def check_none_is_left(model: PreTrainedModel, reader: CheckpointReader, used: Collection[str]) -> None:
    """Raises BackboneError where the checkpoint holds more than was used: the model would answer as another."""
    superfluous = [name for name in reader.names if name not in used and not _may_be_ignored(model, name)]
    if superfluous:
        raise BackboneError(
            f"{reader.directory} holds {len(superfluous)} tensors that {type(model).__name__} does not have, "
            f"{', '.join(superfluous[:5])} among them"
        )


def _may_be_ignored(model: PreTrainedModel, name: str) -> bool:
    # Older checkpoints carry buffers that are computed now, and tied heads carry a second copy of the embedding.
    if name.endswith((".inv_freq", ".masked_bias", ".attention.bias")) or name == "lm_head.weight":
        return True
    # What its architecture leaves out by design, such as layers that predict several tokens.
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
