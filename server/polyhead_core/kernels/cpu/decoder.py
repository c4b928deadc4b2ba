"""The C++ decoder layers (decoder.h) behind the interface that all devices share."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead_core.kernels.decoder import DecoderLayer, DecoderShape, DecoderStep, Int8Group


class CpuDecoderStack:
    """See DecoderStack. Keeps copies of the weights, packed for the processor."""

    def __init__(self, shape: DecoderShape) -> None:
        self._stack = torch.classes.polyhead_cpu.DecoderStack(
            shape.hidden, shape.heads, shape.kv_heads, shape.head_width, shape.eps, int(shape.activation)
        )

    def add_layer(self, layer: DecoderLayer) -> None:
        packed = [_pack(group) for group in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        self._stack.add_layer(
            layer.input_norm_H, layer.post_norm_H, layer.q_norm_D, layer.k_norm_D, *packed, layer.key_pages_NGBD,
            layer.value_pages_NGBD, layer.scale, layer.sliding_window, layer.softcap, list(layer.sites),
        )  # fmt: skip

    def forward(self, first: int, last: int, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor, step: DecoderStep) -> None:
        tables = step.tables
        self._stack.forward(
            first, last, x_TH, cos_TR, sin_TR, step.positions, step.sequence, step.block_tables, step.key_offsets,
            step.slot_mapping, step.adapter_slots, tables.arena, tables.num_pages, tables.pages, tables.bias,
        )  # fmt: skip

    def take_phase_seconds(self) -> dict[str, float]:
        return dict(self._stack.take_phase_seconds())


def _pack(group: Int8Group) -> object:
    return torch.classes.polyhead_cpu.PackedLinear(
        group.weight_OI, group.absmax_O, group.input_scale_I, group.outlier_columns_K, group.bias_O, True
    )
