"""Rows to int8 in one pass, with what stands before it fused in: an RMSNorm, or a gated MLP's activation(gate) * up.

Shapes: T rows, I width, K outlier columns. A program holds one row; rows never meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from polyhead_core.kernels.decoder import Activation
from polyhead_core.kernels.triton.arithmetic import int8_scale, largest_magnitude, tile_width, to_int8, warps_for

_PLAIN, _NORM = 0, 1  # what a row's x is made of
_GATED = {Activation.SILU: 2, Activation.GELU_TANH: 3}


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """x' = scale q, and on the outlier columns, where q is zero, x'_K = high_scale high + low_scale low."""

    q_TI: Tensor
    scale_T: Tensor
    high_TK: Tensor | None = None
    high_scale_T: Tensor | None = None
    low_TK: Tensor | None = None
    low_scale_T: Tensor | None = None
    x_TI: Tensor | None = None
    """The float32 x before smoothing, which the adapters of the layer read; where it was asked for."""


@triton.jit
def _load_x(x_ptr, other_ptr, row, stride, columns, inside, factor, SOURCE: tl.constexpr):
    """x at `columns` of a row in float32: plain, weight * (x * factor), silu(x) * other, or gelu(x) * other."""
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == 1:
        x = tl.load(other_ptr + columns, mask=inside, other=0.0).to(tl.float32) * (x * factor)
    if SOURCE >= 2:
        up = tl.load(other_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        argument = x
        if SOURCE == 3:  # by 1 + tanh(a) = 2 sigmoid(2 a)
            argument = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        x = x * tl.div_rn(1.0, 1.0 + tl.exp(-argument)) * up
    return x


@triton.jit
def _quantize_kernel(
    x_ptr, other_ptr, input_scale_ptr, inlier_ptr, outlier_ptr,
    q_ptr, scale_ptr, high_ptr, high_scale_ptr, low_ptr, low_scale_ptr, x_out_ptr,
    width, stride, num_outliers, eps,
    SOURCE: tl.constexpr, SMOOTHED: tl.constexpr, OUTLIERS: tl.constexpr, KEEP_X: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_I)
    inside = columns < width
    factor = 1.0
    if SOURCE == 1:
        raw = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(raw * raw, axis=0), width.to(tl.float32))
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    x = _load_x(x_ptr, other_ptr, row, stride, columns, inside, factor, SOURCE)
    if KEEP_X:
        tl.store(x_out_ptr + row * width + columns, x, mask=inside)
    if SMOOTHED:
        x = tl.div_rn(x, tl.load(input_scale_ptr + columns, mask=inside, other=1.0))
    if OUTLIERS:
        x = tl.where(tl.load(inlier_ptr + columns, mask=inside, other=0) != 0, x, 0.0)
        k = tl.arange(0, BLOCK_K)
        outlier = k < num_outliers
        at = tl.load(outlier_ptr + k, mask=outlier, other=0)
        wide = _load_x(x_ptr, other_ptr, row, stride, at, outlier, factor, SOURCE)
        if SMOOTHED:
            wide = tl.div_rn(wide, tl.load(input_scale_ptr + at, mask=outlier, other=1.0))
        high_scale = int8_scale(largest_magnitude(wide))
        high = to_int8(wide, high_scale)
        rest = wide - high.to(tl.float32) * high_scale
        low_scale = int8_scale(largest_magnitude(rest))
        tl.store(high_ptr + row * num_outliers + k, high, mask=outlier)
        tl.store(high_scale_ptr + row, high_scale)
        tl.store(low_ptr + row * num_outliers + k, to_int8(rest, low_scale), mask=outlier)
        tl.store(low_scale_ptr + row, low_scale)
    scale = int8_scale(largest_magnitude(x))
    tl.store(q_ptr + row * width + columns, to_int8(x, scale), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(
    x_TI: Tensor, input_scale_I: Tensor | None = None, outlier_columns_K: Tensor | None = None
) -> QuantizedRows:
    """x / input_scale to int8 as reference.int8_linear does it, from any float type."""
    return _quantize(x_TI, x_TI, _PLAIN, input_scale_I, outlier_columns_K)


def rms_norm_quantize(
    x_TI: Tensor,
    weight_I: Tensor,
    eps: float,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    keep_x: bool = False,
) -> QuantizedRows:
    """quantize_rows of reference.rms_norm(x, weight, eps)."""
    return _quantize(x_TI, weight_I, _NORM, input_scale_I, outlier_columns_K, eps=eps, keep_x=keep_x)


def rms_norm(x_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """reference.rms_norm, each row summed up in the same order whatever the number of rows; torch's mean is not."""
    normed_TI = rms_norm_quantize(x_TI, weight_I, eps, keep_x=True).x_TI if len(x_TI) else x_TI.float()
    assert normed_TI is not None
    return normed_TI


def gated_quantize(
    gate_TI: Tensor,
    up_TI: Tensor,
    activation: Activation,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    keep_x: bool = False,
) -> QuantizedRows:
    """quantize_rows of reference.gated(gate, up, activation); both may be halves of one product's rows."""
    if gate_TI.stride() != up_TI.stride():
        gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    return _quantize(gate_TI, up_TI, _GATED[activation], input_scale_I, outlier_columns_K, keep_x=keep_x)


def _quantize(
    x_TI: Tensor,
    other: Tensor,
    source: int,
    input_scale_I: Tensor | None,
    outlier_columns_K: Tensor | None,
    eps: float = 0.0,
    keep_x: bool = False,
) -> QuantizedRows:
    if x_TI.stride(1) != 1:
        x_TI, other = x_TI.contiguous(), other.contiguous()
    rows, width = x_TI.shape
    num_outliers = 0 if outlier_columns_K is None else len(outlier_columns_K)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_TI.device)

    result = QuantizedRows(
        q_TI=empty(rows, width, dtype=torch.int8),
        scale_T=empty(rows),
        high_TK=empty(rows, num_outliers, dtype=torch.int8) if num_outliers else None,
        high_scale_T=empty(rows) if num_outliers else None,
        low_TK=empty(rows, num_outliers, dtype=torch.int8) if num_outliers else None,
        low_scale_T=empty(rows) if num_outliers else None,
        x_TI=empty(rows, width) if keep_x else None,
    )
    _quantize_kernel[(rows,)](
        x_TI, other, input_scale_I,
        _inliers(outlier_columns_K, width) if outlier_columns_K is not None and num_outliers else None,
        outlier_columns_K if num_outliers else None,
        result.q_TI, result.scale_T, result.high_TK, result.high_scale_T, result.low_TK, result.low_scale_T,
        result.x_TI, width, x_TI.stride(0), num_outliers, eps,
        SOURCE=source, SMOOTHED=input_scale_I is not None, OUTLIERS=num_outliers > 0, KEEP_X=keep_x,
        BLOCK_I=tile_width(width), BLOCK_K=tile_width(num_outliers),
        num_warps=warps_for(width), enable_fp_fusion=False,
    )  # fmt: skip
    return result


_INLIERS = WeakTensorKeyDictionary()  # outlier columns, fixed at conversion -> the mask made from them, once


def _inliers(outlier_columns_K: Tensor, width: int) -> Tensor:
    """[width] int8: 0 at the outlier columns, 1 elsewhere."""
    mask_I: Tensor | None = _INLIERS.get(outlier_columns_K)
    if mask_I is None:
        mask_I = torch.ones(width, dtype=torch.int8, device=outlier_columns_K.device)
        mask_I.index_fill_(0, outlier_columns_K, 0)
        _INLIERS[outlier_columns_K] = mask_I
    return mask_I
