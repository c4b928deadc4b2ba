"""Decoder layers of the common form as Triton launches.

Ten a layer, one more where attention is split by segments of keys, several more for each product that was measured to
be fastest in cuBLAS (its sums, their scaling, padding), and two for each group of sites with adapters.

The residual stays in float32; queries are rounded to the pages' type. No launch depends on a number that the host would
have to read from the device, so a CUDA graph can hold all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead_core.kernels.decoder import DecoderLayer, DecoderShape, DecoderStep, Int8Group
from polyhead_core.kernels.triton import tuning
from polyhead_core.kernels.triton.attention import paged_attention
from polyhead_core.kernels.triton.low_rank import SitePart, low_rank_add_parts
from polyhead_core.kernels.triton.quantize import (
    QuantizedRows,
    gated_quantize,
    quantize_rows,
    rms_norm_quantize,
)
from polyhead_core.kernels.triton.rotary import HeadNorms, rotary_write_kv


@dataclass(frozen=True)
class _Product:
    """One group of int8 layers, and where the outputs of its sites stand."""

    group: Int8Group
    outlier_weight_OK: Tensor | None
    parts: tuple[SitePart, ...]

    @classmethod
    def of(cls, group: Int8Group, sites: tuple[int, ...], widths: tuple[int, ...]) -> _Product:
        columns_K = group.outlier_columns_K
        begins = [sum(widths[:index]) for index in range(len(widths))]
        return cls(
            group,
            None if columns_K is None else group.weight_OI[:, columns_K].contiguous(),
            tuple(SitePart(site=s, begin=b, width=w) for s, b, w in zip(sites, begins, widths, strict=True)),
        )

    @property
    def quantisation(self) -> tuple[Tensor | None, Tensor | None]:
        return self.group.input_scale_I, self.group.outlier_columns_K

    def active(self, step: DecoderStep) -> list[SitePart]:
        return [part for part in self.parts if part.site in step.active_sites]

    def __call__(
        self, rows: QuantizedRows, x_TI: Tensor | None, step: DecoderStep, out_TO: Tensor | None = None
    ) -> Tensor:
        """(out +) W x + what the rows' adapters add; `x_TI` is what these read."""
        group = self.group
        product = tuning.w8a8_product(rows, group.weight_OI)
        y_TO = product(rows, group.weight_OI, group.absmax_O, self.outlier_weight_OK, group.bias_O, out_TO)
        if parts := self.active(step):
            assert x_TI is not None
            low_rank_add_parts(y_TO, x_TI, step.tables, parts, step.adapter_slots)
        return y_TO


@dataclass(frozen=True)
class _Layer:
    parts: DecoderLayer
    qkv: _Product
    output: _Product
    gate_up: _Product
    down: _Product
    head_norms: HeadNorms | None


class TritonDecoderStack:
    """See DecoderStack."""

    def __init__(self, shape: DecoderShape) -> None:
        self._shape = shape
        self._layers: list[_Layer] = []

    def add_layer(self, layer: DecoderLayer) -> None:
        shape, sites = self._shape, layer.sites
        q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        inner = layer.down.weight_OI.shape[1]
        norms = HeadNorms(q=layer.q_norm_D, k=layer.k_norm_D, eps=shape.eps) if layer.q_norm_D.numel() else None
        self._layers.append(
            _Layer(
                parts=layer,
                qkv=_Product.of(layer.qkv, sites[:3], (q, kv, kv)),
                output=_Product.of(layer.output, sites[3:4], (shape.hidden,)),
                gate_up=_Product.of(layer.gate_up, sites[4:6], (inner, inner)),
                down=_Product.of(layer.down, sites[6:], (shape.hidden,)),
                head_norms=norms,
            )
        )

    def forward(self, first: int, last: int, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor, step: DecoderStep) -> None:
        assert x_TH.dtype == torch.float32
        assert x_TH.is_contiguous()
        for layer in self._layers[first:last]:
            self._attend(layer, x_TH, cos_TR, sin_TR, step)
            self._transform(layer, x_TH, step)

    def _attend(self, layer: _Layer, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor, step: DecoderStep) -> None:
        shape, parts = self._shape, layer.parts
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_width
        rows = self._normed(x_TH, parts.input_norm_H, layer.qkv, step)
        q_TO, k_TO, v_TO = layer.qkv(rows, rows.x_TI, step).split([heads * width, *[kv_heads * width] * 2], dim=1)
        q_THD = rotary_write_kv(
            q_TO.unflatten(1, (heads, width)), k_TO.unflatten(1, (kv_heads, width)),
            v_TO.unflatten(1, (kv_heads, width)), cos_TR, sin_TR, parts.key_pages_NGBD, parts.value_pages_NGBD,
            step.slot_mapping, layer.head_norms, parts.key_pages_NGBD.dtype,
        )  # fmt: skip
        attended_THD = paged_attention(
            q_THD, parts.key_pages_NGBD, parts.value_pages_NGBD, step.block_tables, step.sequence, step.positions,
            parts.scale, parts.sliding_window, parts.softcap, step.key_offsets, out_dtype=torch.float32,
        )  # fmt: skip
        attended_TI = attended_THD.flatten(1)
        layer.output(quantize_rows(attended_TI, *layer.output.quantisation), attended_TI, step, x_TH)

    def _transform(self, layer: _Layer, x_TH: Tensor, step: DecoderStep) -> None:
        rows = self._normed(x_TH, layer.parts.post_norm_H, layer.gate_up, step)
        gate_TI, up_TI = layer.gate_up(rows, rows.x_TI, step).chunk(2, dim=1)
        keep_x = bool(layer.down.active(step))
        rows = gated_quantize(gate_TI, up_TI, self._shape.activation, *layer.down.quantisation, keep_x=keep_x)
        layer.down(rows, rows.x_TI, step, x_TH)

    def _normed(self, x_TH: Tensor, weight_H: Tensor, product: _Product, step: DecoderStep) -> QuantizedRows:
        keep_x = bool(product.active(step))
        return rms_norm_quantize(x_TH, weight_H, self._shape.eps, *product.quantisation, keep_x=keep_x)

    def take_phase_seconds(self) -> dict[str, float]:
        """Nothing: launches return before their work is done."""
        return {}
