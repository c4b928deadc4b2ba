"""What the kernels share: rounding as torch rounds, which types a product runs in, and tile widths."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on the CPU, slowly, for tests."""


@triton.jit
def round_half_even(x):
    """x to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bit below the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def largest_magnitude(x):
    """The largest |x| of a row, which is no number if one of them is none.

    By the bits without the sign, which order as |x| does with NaN above infinity: tl.max of floats would skip it.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def int8_scale(largest):
    """The a of reference.quantize_rows for the largest |x| of a row; NaN stays NaN, and spoils the row's products."""
    return tl.maximum(tl.div_rn(largest, 127.0), 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_int8(x, scale):
    return round_half_even(tl.div_rn(x, scale)).to(tl.int8)


def product_dtype(*tensors: torch.Tensor) -> Any:
    """bfloat16 where all operands are, so that tensor cores take them as they are; else float32, without TF32.

    The interpreter's product misreads bfloat16 (it multiplies the bit patterns), so there it is always float32.
    """
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in tensors) and not INTERPRETED
    return tl.bfloat16 if narrow else tl.float32


def tile_width(width: int, least: int = 16) -> int:
    """The power of two that holds `width`, at least what a product's tile must have."""
    return max(least, int(triton.next_power_of_2(width)))


def warps_for(width: int) -> int:
    """Warps of a program that holds a whole row of `width` elements in registers."""
    return min(16, max(1, tile_width(width) // 512))
