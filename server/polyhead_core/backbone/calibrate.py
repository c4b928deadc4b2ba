"""Calibration at conversion: where plain W8A8 loses quality, moves the difficulty from activations into the weights.

For each group of linear layers that read the same input: smoothing (SmoothQuant, Xiao et al. 2022) by
s = max|x|^alpha / max|W|^(1 - alpha) per input channel, then the channels that are still largest become the static
outlier columns. Both are fixed here, once, so nothing at run time looks across the rows of a batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from polyhead_core.backbone.checkpoint import CheckpointReader
from polyhead_core.int8 import Int8Linear

logger = logging.getLogger(__name__)

ALPHA = 0.5
MAX_OUTLIER_COLUMNS = 32
NUM_TOKENS = 6144
WINDOW = 512


@dataclass
class InputGroup:
    """Layers that were given the very same tensor, and the largest magnitude seen in each of its channels."""

    paths: list[str] = field(default_factory=list)
    absmax_I: Tensor = field(default_factory=lambda: torch.zeros(0))


def calibrate_model(model: PreTrainedModel, directory: Path) -> None:
    """Runs the plain int8 `model` over the calibration text and requantises its layers from `directory`, in place."""
    groups = observe(model, calibration_tokens(directory, model))
    reader = CheckpointReader(directory, model)
    for group in groups:
        requantize(model, group, reader)


def calibration_tokens(directory: Path, model: PreTrainedModel) -> Tensor:
    """[windows, WINDOW] token ids of the text that ships beside this module."""
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    ids: Tensor = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt", verbose=False).input_ids[0]
    window = min(WINDOW, int(getattr(model.config, "max_position_embeddings", WINDOW)))
    count = max(1, min(NUM_TOKENS, len(ids)) // window)
    return ids[: count * window].reshape(count, window)


@torch.no_grad()
def observe(model: PreTrainedModel, tokens_NW: Tensor) -> list[InputGroup]:
    """The input groups of the model's int8 layers with their channels' magnitudes over `tokens_NW`."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Int8Linear)}
    absmax = {path: torch.zeros(layer.in_features) for path, layer in layers.items()}
    groups: list[InputGroup] = []
    group_of: dict[str, InputGroup] = {}
    previous: list[Tensor] = []

    def watch(path: str, x: Tensor) -> None:
        if path not in group_of:
            if not previous or previous[0] is not x:
                groups.append(InputGroup())
            groups[-1].paths.append(path)
            group_of[path] = groups[-1]
            previous[:] = [x]
        largest = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        torch.maximum(absmax[path], largest, out=absmax[path])

    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: watch(path, args[0]))
        for path, layer in layers.items()
    ]
    try:
        for window in tokens_NW:
            model(input_ids=window.unsqueeze(0), use_cache=False, logits_to_keep=64)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.forget_packed()
    for group in groups:
        group.absmax_I = absmax[group.paths[0]]
    return groups


def requantize(model: PreTrainedModel, group: InputGroup, reader: CheckpointReader) -> None:
    from polyhead_core.backbone.convert import weight_name
    from polyhead_core.backbone.load import replace_module

    names = [weight_name(reader, model, path) for path in group.paths]
    weight_absmax_I = torch.stack([reader.read(name).abs().amax(0).float() for name in names]).amax(0)
    scale_I, columns_K = smoothing(group.absmax_I, weight_absmax_I)
    for path, name in zip(group.paths, names, strict=True):
        bias = model.get_submodule(path).bias
        columns = None if columns_K is None else columns_K.clone()
        layer = Int8Linear.from_weight(reader.read(name), bias, scale_I.clone(), columns)  # type: ignore[arg-type]
        replace_module(model, path, layer.eval())


def smoothing(activation_absmax_I: Tensor, weight_absmax_I: Tensor) -> tuple[Tensor, Tensor | None]:
    """(input_scale [I], outlier_columns [k] or None) from the largest magnitudes of inputs and weights per channel."""
    # A channel that stayed silent in calibration may speak later: it is treated as a tenth of the middle one.
    x_I = activation_absmax_I.clamp_min(float(activation_absmax_I.median()) / 10 + 1e-5)
    w_I = weight_absmax_I.clamp_min(float(weight_absmax_I.median()) / 10 + 1e-5)
    scale_I = x_I.pow(ALPHA) / w_I.pow(1 - ALPHA)
    count = min(MAX_OUTLIER_COLUMNS, len(x_I) // 16)
    if count == 0:
        return scale_I, None
    return scale_I, (x_I / scale_I).topk(count).indices.sort().values
