"""The baseline's weights: an adapter merged into a copy of the backbone, and what it takes to change one for another.

Merged models keep int8 and the backbone's calibration, so they run in the same engine with the same kernels: a
dedicated model that is as small and as fast as Polyhead's own backbone.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from pathlib import Path

import torch
from cost_adapters import lora_deltas
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_core.int8 import Int8Linear, quantize_weight


class Merger:
    """Holds the backbone twice: its bfloat16 weights, which merging starts from, and int8 to copy all else from."""

    def __init__(self, source: str) -> None:
        self.int8 = load_backbone(source)
        exact = load_backbone(source, quantization="none", dtype="bfloat16")
        self._weights: dict[str, Tensor] = {
            path: exact.model.get_parameter(f"{path}.weight").detach()
            for path, module in self.int8.model.named_modules()
            if isinstance(module, Int8Linear)
        }
        self.bytes_bf16_model = exact.num_bytes

    @property
    def kept_bytes(self) -> int:
        """Of the pristine weights that a merge in place needs beside the merged model."""
        return sum({w.data_ptr(): w.nbytes for w in self._weights.values()}.values())

    def dedicated(self, adapter: Path) -> Backbone:
        """A backbone of its own with the adapter merged in."""
        model = copy.deepcopy(self.int8.model)
        merged = dataclasses.replace(self.int8, model=model)
        self.merge(merged, adapter)
        return merged

    @torch.no_grad()
    def merge(self, into: Backbone, adapter: Path) -> None:
        """W = W_backbone + s B A for every layer that the adapter touches, quantised again. In place."""
        for path, (a_RI, b_OR) in lora_deltas(adapter).items():
            layer = into.model.get_submodule(path)
            assert isinstance(layer, Int8Linear)
            weight_OI = torch.addmm(self._weights[path].float(), b_OR, a_RI)
            quantized_OI, absmax_O = quantize_weight(weight_OI, layer.input_scale)
            layer.set_int8(quantized_OI, absmax_O, layer.bias, layer.input_scale, layer.outlier_columns)


def time_merge(merger: Merger, into: Backbone, adapters: list[Path]) -> list[float]:
    """Seconds of each swap by merging: the adapter is read from its folder, every touched layer is quantised again."""
    seconds = []
    for adapter in adapters:
        began_s = time.perf_counter()
        merger.merge(into, adapter)
        seconds.append(time.perf_counter() - began_s)
    return seconds


def time_cold_load(into: Backbone, merged_file: Path, repeats: int) -> list[float]:
    """Seconds of each swap by reading the layers of a model merged beforehand from disk, past the page cache."""
    layers = {path: m for path, m in into.model.named_modules() if isinstance(m, Int8Linear) and path != "lm_head"}
    tensors = {f"{path}.weight": layer.weight.detach() for path, layer in layers.items()}
    tensors |= {f"{path}.SCB": layer.SCB for path, layer in layers.items()}
    save_file(tensors, merged_file)
    seconds = []
    for _ in range(repeats):
        _drop_from_page_cache(merged_file)
        began_s = time.perf_counter()
        read = load_file(merged_file)
        for path, layer in layers.items():
            layer.weight.detach().copy_(read[f"{path}.weight"])
            layer.SCB.copy_(read[f"{path}.SCB"])
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
