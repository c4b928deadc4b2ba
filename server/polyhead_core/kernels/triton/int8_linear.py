"""Products with int8 weights: W8A8, whose int32 sums are exact, and W8A16, which leaves the activations in float.

Shapes: T rows, I width, O outputs, K outlier columns. The weights [O, I] are read once per tile of BLOCK_T rows. A
W8A8 row is bit for bit the same in every tile shape: integer sums, then float steps in one order, none contracted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyhead_core.kernels import reference
from polyhead_core.kernels.triton.arithmetic import product_dtype, tile_width
from polyhead_core.kernels.triton.quantize import QuantizedRows, quantize_rows


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a product is cut into programs."""

    block_t: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return "x".join(str(value) for value in asdict(self).values())


def default_tile(rows: int) -> Tile:
    """A guess by the number of rows, until a measurement says better: few rows are bound by reading the weights."""
    if rows <= 32:
        return Tile(block_t=16 if rows <= 16 else 32, block_o=32, block_i=256, num_warps=4, num_stages=4)
    return Tile(block_t=64 if rows <= 64 else 128, block_o=128, block_i=64, num_warps=8, num_stages=3)


@triton.jit
def _scaled(
    y, absmax_ptr, bias_ptr, outputs, inside, BIASED: tl.constexpr
):  # fmt: skip
    """The columns' scale and bias, which W8A8 and W8A16 share."""
    absmax = tl.load(absmax_ptr + outputs, mask=inside, other=0.0)
    y = y * tl.div_rn(absmax, 127.0)[None, :]
    if BIASED:
        y = y + tl.load(bias_ptr + outputs, mask=inside, other=0.0)[None, :]
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _int8_kernel(
    q_ptr, scale_ptr, high_ptr, high_scale_ptr, low_ptr, low_scale_ptr,
    weight_ptr, absmax_ptr, outlier_weight_ptr, bias_ptr, y_ptr,
    num_rows, width, num_outputs, num_outliers,
    OUTLIERS: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    has_output, has_row = outputs < num_outputs, rows < num_rows
    outputs_wide, rows_wide = outputs.to(tl.int64), rows.to(tl.int64)
    sums = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.int32)
    for start in range(0, width, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < width
        q = tl.load(q_ptr + rows_wide[:, None] * width + i[None, :], mask=has_row[:, None] & inside[None, :], other=0)
        w = tl.load(
            weight_ptr + outputs_wide[:, None] * width + i[None, :],
            mask=has_output[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        sums = tl.dot(q, tl.trans(w), sums, out_dtype=tl.int32)
    y = sums.to(tl.float32) * tl.load(scale_ptr + rows, mask=has_row, other=0.0)[:, None]
    if OUTLIERS:
        k = tl.arange(0, BLOCK_K)
        outlier = k < num_outliers
        at = rows_wide[:, None] * num_outliers + k[None, :]
        w = tl.load(
            outlier_weight_ptr + outputs_wide[:, None] * num_outliers + k[None, :],
            mask=has_output[:, None] & outlier[None, :], other=0,
        )  # fmt: skip
        inside = has_row[:, None] & outlier[None, :]
        high = tl.dot(tl.load(high_ptr + at, mask=inside, other=0), tl.trans(w), out_dtype=tl.int32)
        low = tl.dot(tl.load(low_ptr + at, mask=inside, other=0), tl.trans(w), out_dtype=tl.int32)
        y = y + high.to(tl.float32) * tl.load(high_scale_ptr + rows, mask=has_row, other=0.0)[:, None]
        y = y + low.to(tl.float32) * tl.load(low_scale_ptr + rows, mask=has_row, other=0.0)[:, None]
    y = _scaled(y, absmax_ptr, bias_ptr, outputs, has_output, BIASED)
    at_y = y_ptr + rows_wide[:, None] * num_outputs + outputs[None, :]
    here = has_row[:, None] & has_output[None, :]
    if ADD:
        y = tl.load(at_y, mask=here, other=0.0) + y
    tl.store(at_y, y, mask=here)


@triton.jit
def _epilogue_kernel(
    sums_ptr, scale_ptr, high_ptr, high_scale_ptr, low_ptr, low_scale_ptr,
    absmax_ptr, bias_ptr, y_ptr, num_outputs,
    OUTLIERS: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What _int8_kernel does after its sums, in the same order, for sums that cuBLAS made."""
    row = tl.program_id(0).to(tl.int64)  # along the one axis of a grid that may be longer than 65,535
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = outputs < num_outputs
    at = row * num_outputs + outputs
    y = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32) * tl.load(scale_ptr + row)
    if OUTLIERS:
        y = y + tl.load(high_ptr + at, mask=inside, other=0).to(tl.float32) * tl.load(high_scale_ptr + row)
        y = y + tl.load(low_ptr + at, mask=inside, other=0).to(tl.float32) * tl.load(low_scale_ptr + row)
    absmax = tl.load(absmax_ptr + outputs, mask=inside, other=0.0)
    y = y * tl.div_rn(absmax, 127.0)
    if BIASED:
        y = y + tl.load(bias_ptr + outputs, mask=inside, other=0.0)
    if ADD:
        y = tl.load(y_ptr + at, mask=inside, other=0.0) + y
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_only_kernel(
    x_ptr, weight_ptr, absmax_ptr, input_scale_ptr, bias_ptr, y_ptr,
    num_rows, width, num_outputs,
    SMOOTHED: tl.constexpr, BIASED: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    has_output, has_row = outputs < num_outputs, rows < num_rows
    outputs_wide, rows_wide = outputs.to(tl.int64), rows.to(tl.int64)
    y = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, width, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < width
        x = tl.load(x_ptr + rows_wide[:, None] * width + i[None, :], mask=has_row[:, None] & inside[None, :], other=0.0)
        if SMOOTHED:
            x = tl.div_rn(x.to(tl.float32), tl.load(input_scale_ptr + i, mask=inside, other=1.0)[None, :])
        w = tl.load(
            weight_ptr + outputs_wide[:, None] * width + i[None, :],
            mask=has_output[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        y = tl.dot(x.to(PRODUCT), tl.trans(w.to(tl.float32).to(PRODUCT)), y, input_precision="ieee")
    y = _scaled(y, absmax_ptr, bias_ptr, outputs, has_output, BIASED)
    tl.store(
        y_ptr + rows_wide[:, None] * num_outputs + outputs[None, :], y, mask=has_row[:, None] & has_output[None, :]
    )


def int8_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See reference.int8_linear: two launches, rows to int8 and the product."""
    rows = quantize_rows(x_TI, input_scale_I, outlier_columns_K)
    return int8_product(rows, weight_OI, absmax_O, outlier_weight_OK, bias_O, tile=tile)


def int8_product(
    rows: QuantizedRows,
    weight_OI: Tensor,
    absmax_O: Tensor,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
    out_TO: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The products and sums of reference.int8_linear, of rows that are quantised already; float32 [T, O].

    `out_TO`: contiguous float32, to which they are added in place.
    """
    (num_rows, width), num_outputs = rows.q_TI.shape, weight_OI.shape[0]
    assert weight_OI.is_contiguous()
    tile = tile or default_tile(num_rows)
    num_outliers = 0 if rows.high_TK is None else rows.high_TK.shape[1]
    y_TO = _result(out_TO, num_rows, weight_OI)
    _int8_kernel[(triton.cdiv(num_outputs, tile.block_o), triton.cdiv(num_rows, tile.block_t))](
        rows.q_TI, rows.scale_T, rows.high_TK, rows.high_scale_T, rows.low_TK, rows.low_scale_T,
        weight_OI, absmax_O, outlier_weight_OK if num_outliers else None, bias_O, y_TO,
        num_rows, width, num_outputs, num_outliers,
        OUTLIERS=num_outliers > 0, BIASED=bias_O is not None, ADD=out_TO is not None,
        BLOCK_T=tile.block_t, BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_K=tile_width(num_outliers, 32),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y_TO


def int8_product_cublas(
    rows: QuantizedRows,
    weight_OI: Tensor,
    absmax_O: Tensor,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
    out_TO: Tensor | None = None,
) -> Tensor:
    """int8_product with torch._int_mm's sums: the same bits, faster where there are many rows."""
    num_rows, num_outputs = rows.q_TI.shape[0], weight_OI.shape[0]
    high_TO = low_TO = None
    if rows.high_TK is not None and rows.low_TK is not None:
        assert outlier_weight_OK is not None
        high_TO = reference.int8_product(rows.high_TK, outlier_weight_OK).contiguous()
        low_TO = reference.int8_product(rows.low_TK, outlier_weight_OK).contiguous()
    y_TO = _result(out_TO, num_rows, weight_OI)
    _epilogue_kernel[(num_rows, triton.cdiv(num_outputs, 1024))](
        reference.int8_product(rows.q_TI, weight_OI).contiguous(), rows.scale_T,
        high_TO, rows.high_scale_T, low_TO, rows.low_scale_T, absmax_O, bias_O, y_TO, num_outputs,
        OUTLIERS=high_TO is not None, BIASED=bias_O is not None, ADD=out_TO is not None, BLOCK_O=1024,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y_TO


def _result(out_TO: Tensor | None, num_rows: int, weight_OI: Tensor) -> Tensor:
    if out_TO is None:
        return torch.empty(num_rows, weight_OI.shape[0], device=weight_OI.device)
    assert out_TO.dtype == torch.float32
    assert out_TO.is_contiguous()
    assert out_TO.shape == (num_rows, weight_OI.shape[0])
    return out_TO


def int8_linear_weight_only(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    bias_O: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See reference.int8_linear_weight_only. With bfloat16 x, x / input_scale is rounded to bfloat16."""
    (num_rows, width), num_outputs = x_TI.shape, weight_OI.shape[0]
    assert weight_OI.is_contiguous()
    tile = tile or Tile(block_t=16, block_o=32, block_i=128, num_warps=4, num_stages=4)
    y_TO = torch.empty(num_rows, num_outputs, device=weight_OI.device)
    _weight_only_kernel[(triton.cdiv(num_outputs, tile.block_o), triton.cdiv(num_rows, tile.block_t))](
        x_TI.contiguous(), weight_OI, absmax_O, input_scale_I, bias_O, y_TO, num_rows, width, num_outputs,
        SMOOTHED=input_scale_I is not None, BIASED=bias_O is not None, PRODUCT=product_dtype(x_TI),
        BLOCK_T=tile.block_t, BLOCK_O=tile.block_o, BLOCK_I=tile.block_i,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y_TO
