"""Rotary position embedding of queries and keys, and the store of keys and values into their pages, in one launch.

Where the heads have norms of their own (Qwen 3), they come first, in the same launch.

Shapes: T tokens, H query heads, G key/value heads, D head width, R rotary width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyhead_core.kernels.triton.arithmetic import tile_width


@triton.jit
def _rotated(x_ptr, at, d, here, cos, sin, norm_ptr, head_width, eps, HALF: tl.constexpr, NORMED: tl.constexpr):
    """x at the addresses `at` (of width d), rotated: x cos + turned sin, where turned is -x[d + R/2] or x[d - R/2]."""
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    turns = here & (d < 2 * HALF)[None, :]
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    turned = tl.load(x_ptr + at - d[None, :] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    if NORMED:
        mean = tl.div_rn(tl.sum(x * x, axis=1), head_width.to(tl.float32))
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        x = x * factor * tl.load(norm_ptr + d, mask=d < head_width, other=0.0)[None, :]
        turned = turned * factor * tl.load(norm_ptr + partner, mask=d < 2 * HALF, other=0.0)[None, :]
    turned = tl.where((d < HALF)[None, :], -turned, turned)
    return tl.where(turns, x * cos[None, :] + turned * sin[None, :], x)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slot_mapping_ptr,
    q_norm_ptr, k_norm_ptr, q_out_ptr, k_pages_ptr, v_pages_ptr,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride,
    v_head_stride, block_stride, head_stride, num_heads, kv_heads, head_width, eps,
    HALF: tl.constexpr, NORMED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    has_width = d < head_width
    g = tl.arange(0, BLOCK_G)
    here = (g < kv_heads)[:, None] & has_width[None, :]
    if HALF > 0:
        turns = d < 2 * HALF
        cos = tl.load(cos_ptr + token * 2 * HALF + d, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * 2 * HALF + d, mask=turns, other=0.0).to(tl.float32)
        h = tl.arange(0, BLOCK_H)
        is_query = (h < num_heads)[:, None] & has_width[None, :]
        at = token * q_token_stride + h[:, None] * q_head_stride + d[None, :]
        q = _rotated(q_ptr, at, d, is_query, cos, sin, q_norm_ptr, head_width, eps, HALF, NORMED)
        at_out = (token * num_heads + h[:, None]) * head_width + d[None, :]
        tl.store(q_out_ptr + at_out, q.to(q_out_ptr.dtype.element_ty), mask=is_query)
        at = token * k_token_stride + g[:, None] * k_head_stride + d[None, :]
        k = _rotated(k_ptr, at, d, here, cos, sin, k_norm_ptr, head_width, eps, HALF, NORMED)
        k = k.to(k_ptr.dtype.element_ty)  # the reference rounds the rotated key to its own type, then to the pages'
    else:
        k = tl.load(k_ptr + token * k_token_stride + g[:, None] * k_head_stride + d[None, :], mask=here, other=0.0)
    v = tl.load(v_ptr + token * v_token_stride + g[:, None] * v_head_stride + d[None, :], mask=here, other=0.0)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    at_page = slot // BLOCK_SIZE * block_stride + g[:, None] * head_stride + slot % BLOCK_SIZE * head_width + d[None, :]
    tl.store(k_pages_ptr + at_page, k.to(k_pages_ptr.dtype.element_ty), mask=here)
    tl.store(v_pages_ptr + at_page, v.to(v_pages_ptr.dtype.element_ty), mask=here)


@dataclass(frozen=True, kw_only=True)
class HeadNorms:
    """Weights [D] float32 of the RMS norms of queries and keys."""

    q: Tensor
    k: Tensor
    eps: float


def rotary_write_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_pages_NGBD: Tensor,
    v_pages_NGBD: Tensor,
    slot_mapping_T: Tensor,
    norms: HeadNorms | None = None,
    q_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns reference.rotate of q, in q_dtype (None: q's own); writes reference.rotate of k, and v, as
    reference.write_kv does. With `norms`, q and k are first what reference.rms_norm makes of them."""
    q_out_THD = torch.empty(q_THD.shape, dtype=q_dtype or q_THD.dtype, device=q_THD.device)
    _launch(q_THD, k_TGD, v_TGD, cos_TR, sin_TR, norms, q_out_THD, k_pages_NGBD, v_pages_NGBD, slot_mapping_T)
    return q_out_THD


def write_kv(k_TGD: Tensor, v_TGD: Tensor, k_pages_NGBD: Tensor, v_pages_NGBD: Tensor, slot_mapping_T: Tensor) -> None:
    """See reference.write_kv."""
    _launch(None, k_TGD, v_TGD, None, None, None, None, k_pages_NGBD, v_pages_NGBD, slot_mapping_T)


def _launch(
    q_THD: Tensor | None,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TR: Tensor | None,
    sin_TR: Tensor | None,
    norms: HeadNorms | None,
    q_out_THD: Tensor | None,
    k_pages_NGBD: Tensor,
    v_pages_NGBD: Tensor,
    slot_mapping_T: Tensor,
) -> None:
    assert k_pages_NGBD.is_contiguous()
    assert v_pages_NGBD.is_contiguous()
    q_THD = None if q_THD is None else _dense_widths(q_THD)
    k_TGD, v_TGD = _dense_widths(k_TGD), _dense_widths(v_TGD)
    num_tokens, kv_heads, head_width = k_TGD.shape
    num_heads = 1 if q_THD is None else q_THD.shape[1]
    q_strides = (0, 0) if q_THD is None else q_THD.stride()[:2]
    _rotary_kernel[(num_tokens,)](
        q_THD, k_TGD, v_TGD,
        None if cos_TR is None else cos_TR.contiguous(), None if sin_TR is None else sin_TR.contiguous(),
        slot_mapping_T, *((None, None) if norms is None else (norms.q, norms.k)), q_out_THD, k_pages_NGBD, v_pages_NGBD,
        *q_strides, *k_TGD.stride()[:2], *v_TGD.stride()[:2], k_pages_NGBD.stride(0), k_pages_NGBD.stride(1),
        num_heads, kv_heads, head_width, 0.0 if norms is None else norms.eps,
        HALF=0 if cos_TR is None else cos_TR.shape[1] // 2, NORMED=norms is not None, BLOCK_SIZE=k_pages_NGBD.shape[2],
        BLOCK_H=tile_width(num_heads, 1), BLOCK_G=tile_width(kv_heads, 1), BLOCK_D=tile_width(head_width),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _dense_widths(x_THD: Tensor) -> Tensor:
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
