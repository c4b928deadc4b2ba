"""The likeliest token of each row of logits, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyhead_core.kernels.triton.arithmetic import tile_width

_BLOCK_V = 4096


@triton.jit
def _greedy_kernel(
    logits_ptr, ids_ptr, size,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    largest = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
    ids = tl.zeros((BLOCK_V,), dtype=tl.int32)
    broken = tl.zeros((BLOCK_V,), dtype=tl.int32)
    for start in range(0, size, BLOCK_V):
        inside = start + v < size
        x = tl.load(logits_ptr + row * size + start + v, mask=inside, other=float("-inf"))
        # NaN and infinity have all bits of the exponent.
        broken |= (inside & ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000)).to(tl.int32)
        larger = x > largest  # of equal ones the first stays
        ids = tl.where(larger, start + v, ids)
        largest = tl.where(larger, x, largest)
    best = tl.max(largest, axis=0)
    id_of_best = tl.min(tl.where(largest == best, ids, 2147483647), axis=0)
    tl.store(ids_ptr + row, tl.where(tl.max(broken, axis=0) > 0, -1, id_of_best).to(tl.int64))


def greedy(logits_LV: Tensor) -> Tensor:
    """See reference.greedy; contiguous float32 logits."""
    num_rows, size = logits_LV.shape
    assert logits_LV.is_contiguous()
    assert logits_LV.dtype == torch.float32
    ids_L = torch.empty(num_rows, dtype=torch.int64, device=logits_LV.device)
    if num_rows:
        _greedy_kernel[(num_rows,)](logits_LV, ids_L, size, BLOCK_V=min(_BLOCK_V, tile_width(size)), num_warps=8)
    return ids_L
