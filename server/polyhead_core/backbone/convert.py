"""Makes an int8 directory from a float one: quantises tensor by tensor, calibrates, saves in LLM.int8's layout."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead_core.backbone.checkpoint import CALIBRATED_FILE, PLAIN_FILE, CheckpointReader, read_json
from polyhead_core.backbone.embedding import CastEmbedding
from polyhead_core.backbone.source import publish_directory, staging_directory
from polyhead_core.errors import BackboneError
from polyhead_core.int8 import Int8Linear

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Raise when the same source converts to other tensors or files."""

OWN_QUANT_METHOD = "polyhead_int8"
"""In config.json of a calibrated directory, whose weights mean nothing without input_scale."""

_NOT_COMPUTED = ("_name_or_path", "architectures", "bos_token_id", "eos_token_id", "transformers_version", "use_cache")


def int8_directory(directory: Path, fingerprint: str, cache_dir: Path, *, calibrate: bool = True) -> Path:
    """The cached int8 version of a float directory, made on first use: for its tensors, not its configuration.

    The calibration runs the model, so a configuration that computes something else has a version of its own.
    Peak host memory is about the int8 model (half of a 16-bit source) and its widest tensors in float32.
    """
    kind = "calibrated" if calibrate else "plain"
    target = cache_dir / "int8" / f"{fingerprint[:24]}-{_computation(directory)}-{kind}-v{FORMAT_VERSION}"
    if (target / "config.json").is_file():
        return target
    logger.info("converting %s to int8 (once)", directory)
    model = quantize_directory(directory)
    if calibrate:
        from polyhead_core.backbone.calibrate import calibrate_model

        calibrate_model(model, directory)
    with staging_directory(target) as staging:
        save_int8(model, staging)
        publish_directory(staging, target)
    return target


def _computation(directory: Path) -> str:
    """A hash of what config.json says, apart from what certainly changes no number that the model computes."""
    config = read_json(directory / "config.json")
    kept = {key: value for key, value in config.items() if key not in _NOT_COMPUTED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def weight_name(reader: CheckpointReader, model: PreTrainedModel, path: str) -> str:
    """The checkpoint's name of a linear layer's weight: its own, or the embedding's where the head is tied to it."""
    name = f"{path}.weight"
    if name in reader:
        return name
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and model.get_submodule(path) is model.get_output_embeddings():
        embedding = next(p for p, module in model.named_modules() if module is model.get_input_embeddings())
        if f"{embedding}.weight" in reader:
            return f"{embedding}.weight"
    raise BackboneError(f"{reader.directory} lacks {name}")


def quantize_directory(directory: Path) -> PreTrainedModel:
    """A plain W8A8 model: every linear layer, the head included, by row-wise absmax; all else as in the checkpoint."""
    from polyhead_core.backbone.load import check_none_is_left, empty_model, replace_module

    model = empty_model(directory)
    reader = CheckpointReader(directory, model)
    check_none_is_left(model, reader, model.state_dict())
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            bias = reader.read(f"{path}.bias") if module.bias is not None else None
            weight = reader.read(weight_name(reader, model, path))
            if weight.shape != module.weight.shape:
                raise BackboneError(
                    f"{path}.weight has shape {tuple(weight.shape)}, expected {tuple(module.weight.shape)}"
                )
            replace_module(model, path, Int8Linear.from_weight(weight, bias))
    for path, module in list(model.named_modules()):
        if type(module) is nn.Embedding:
            replace_module(model, path, _embedding(reader, path, module))
        elif not isinstance(module, Int8Linear):
            _read_as_is(reader, path, module)
    return model


def _embedding(reader: CheckpointReader, path: str, module: nn.Embedding) -> CastEmbedding:
    weight = reader.read(f"{path}.weight")
    if weight.dtype == torch.float32:
        # What bitsandbytes' users load an int8 model's other weights in; a table is most of a small model's bytes.
        weight = weight.to(torch.bfloat16)
    return CastEmbedding(weight, torch.float32, padding_idx=module.padding_idx)


def _read_as_is(reader: CheckpointReader, path: str, module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        full = f"{path}.{name}"
        if full not in reader:
            raise BackboneError(f"{reader.directory} lacks {full}")
        tensor = reader.read(full)
        # Norms and biases are small and meet float32 activations in the calibration.
        module._parameters[name] = nn.Parameter(tensor.float() if parameter.dim() < 2 else tensor, requires_grad=False)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if f"{path}.{name}" in reader and name not in module._non_persistent_buffers_set:
            module._buffers[name] = reader.read(f"{path}.{name}").to(buffer.dtype)


def save_int8(model: PreTrainedModel, directory: Path) -> None:
    """Writes config.json and the tensors, in LLM.int8's layout (weight int8, SCB, weight_format).

    A plain model is saved as bitsandbytes would. A calibrated one has input_scale and outlier_columns besides, which
    bitsandbytes would drop without a word: it goes by a method and into a file that other loaders do not know.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=False).items():
        tensors[name] = tensor.contiguous()
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Int8Linear)]
    for path, _ in layers:
        tensors[f"{path}.weight_format"] = torch.tensor(0, dtype=torch.uint8)  # 0: row-major
    calibrated = any(layer.input_scale is not None or layer.outlier_columns is not None for _, layer in layers)
    file = CALIBRATED_FILE if calibrated else PLAIN_FILE
    save_file(tensors, directory / file, metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = (
        {"quant_method": OWN_QUANT_METHOD}
        if calibrated
        else {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": []}
    )
    config["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
