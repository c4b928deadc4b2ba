"""Attention over paged KV, for prefill and decode rows in one launch.

Shapes: T tokens, H query heads, G key/value heads, D head width, S sequences, N keys. A program has STEP tokens that
stand together and one key/value head; it goes through the tokens' runs of one sequence, and its tile holds
(token, query head of the group) pairs. Keys are taken in segments of SEGMENT positions, counted from position 0, each
with a softmax of its own, which are merged in order; so it changes no bit whether one program goes through all segments
or each is a program of its own (flash decoding, Dao et al. 2023), nor what else is in the tile.

torch's `varlen_attn`, which takes a block table from torch 2.13 on, is not used: it knows no soft cap, and keeps a
row's bits apart from its batch only without split keys, when few rows leave most of the device idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyhead_core.kernels.triton.arithmetic import product_dtype, tile_width

_SEGMENT = 512
_BLOCK_N = 32
_FEW_PROGRAMS = 512
"""With fewer programs than this, a processor is better filled by a program for each segment."""
_LOWEST = tl.constexpr(-1.0e38)
"""In place of minus infinity, whose differences are not numbers."""


@triton.jit
def _merge(largest, total, values, largest_2, total_2, values_2):
    """One softmax out of two over different keys: (largest score, sum of exponentials, weighted values) of each."""
    both = tl.maximum(largest, largest_2)
    first, second = tl.exp(largest - both), tl.exp(largest_2 - both)
    return both, total * first + total_2 * second, values * first[:, None] + values_2 * second[:, None]


@triton.jit
def _segment_softmax(
    q, k_ptr, v_ptr, table_ptr, kv_head, places, offset, mine,
    begin, end, block_stride, head_stride, scale, window, softcap,
    head_width, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of exponentials and weighted values of the tile's rows over the keys begin <= n < end.

    n and `places` count from the beginning of the sequence's blocks, whose first key is at `offset`.
    """
    d = tl.arange(0, BLOCK_D)
    has_width = d < head_width
    largest = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        exists = (n >= offset) & (n < end)
        block = tl.load(table_ptr + n // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        at = block * block_stride + kv_head * head_stride + (n % BLOCK_SIZE) * head_width
        there = exists[:, None] & has_width[None, :]
        k = tl.load(k_ptr + at[:, None] + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k).to(PRODUCT), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (tl.div_rn(2.0, 1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        seen = mine[:, None] & (n[None, :] <= places[:, None]) & exists[None, :]
        if WINDOW:
            seen = seen & (n[None, :] > places[:, None] - window)
        scores = tl.where(seen, scores, _LOWEST)
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp(scores - larger[:, None]), 0.0)
        shrink = tl.exp(largest - larger)
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=there, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.dot(weights.to(PRODUCT), v.to(PRODUCT), values * shrink[:, None], input_precision="ieee")
        largest = larger
    return largest, total, values


@triton.jit(do_not_specialize=["num_tokens", "window", "table_width", "num_segments"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, sequence_ptr, positions_ptr, offsets_ptr,
    out_ptr, largest_ptr, total_ptr, values_ptr,
    num_tokens, num_heads, group, head_width, table_width, block_stride,
    head_stride, q_token_stride, q_head_stride, scale, window, softcap, num_segments,
    STEP: tl.constexpr, SPLIT: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, PRODUCT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SPLIT: this program has one segment and leaves its part to _merge_kernel; else it has all and writes out."""
    first = tl.program_id(0) * STEP
    kv_head = tl.program_id(1)
    limit = tl.minimum(first + STEP, num_tokens)
    m = tl.arange(0, BLOCK_M)
    tokens, head = first + m // GROUP, kv_head * group + m % GROUP
    tokens_wide = tokens.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    has_width = d < head_width
    is_pair = (m % GROUP < group) & (tokens < limit)
    q = tl.load(
        q_ptr + tokens_wide[:, None] * q_token_stride + head[:, None] * q_head_stride + d[None, :],
        mask=is_pair[:, None] & has_width[None, :], other=0.0,
    ).to(PRODUCT)  # fmt: skip
    positions = tl.load(positions_ptr + tokens, mask=is_pair, other=-1).to(tl.int32)
    while first < limit:
        sequence = tl.load(sequence_ptr + first)
        run_end = first + 1
        while tl.load(sequence_ptr + run_end, mask=run_end < limit, other=-1) == sequence:
            run_end += 1
        mine = is_pair & (tokens >= first) & (tokens < run_end)
        offset = 0
        if OFFSETS:
            offset = tl.load(offsets_ptr + sequence)
        places = positions + offset
        last_key = tl.max(tl.where(mine, places, -1), axis=0)
        first_seen = offset
        if WINDOW:
            first_seen = tl.maximum(tl.min(tl.where(mine, places, 2147483647), axis=0) - window + 1, offset)
        first_key = first_seen // BLOCK_N * BLOCK_N  # the block of it: those before would change nothing
        table_ptr = tables_ptr + sequence.to(tl.int64) * table_width
        largest = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        values = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        segment = first_key // SEGMENT
        last_segment = last_key // SEGMENT
        if SPLIT:
            segment = tl.maximum(segment, tl.program_id(2))
            last_segment = tl.minimum(last_segment, tl.program_id(2))
        while segment <= last_segment:
            part_largest, part_total, part_values = _segment_softmax(
                q, k_ptr, v_ptr, table_ptr, kv_head, places, offset, mine,
                tl.maximum(segment * SEGMENT, first_key), tl.minimum((segment + 1) * SEGMENT, last_key + 1),
                block_stride, head_stride,
                scale, window, softcap, head_width, BLOCK_SIZE, SOFTCAP, WINDOW, PRODUCT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if SPLIT:
                largest, total, values = part_largest, part_total, part_values
            else:
                largest, total, values = _merge(largest, total, values, part_largest, part_total, part_values)
            segment += 1
        at = tokens_wide * num_heads + head
        here = mine[:, None] & has_width[None, :]
        if SPLIT:
            at = at * num_segments + tl.program_id(2)
            tl.store(largest_ptr + at, largest, mask=mine)
            tl.store(total_ptr + at, total, mask=mine)
            tl.store(values_ptr + at[:, None] * head_width + d[None, :], values, mask=here)
        else:
            out = tl.div_rn(values, tl.where(mine, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at[:, None] * head_width + d[None, :], out, mask=here)
        first = run_end


@triton.jit(do_not_specialize=["num_segments"])
def _merge_kernel(
    out_ptr, largest_ptr, total_ptr, values_ptr, head_width, num_segments,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The merge of _attention_kernel, over the parts of one (token, head) pair."""
    pair = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    has_width = d < head_width
    one = tl.arange(0, 1)
    largest = tl.full((1,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    values = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    segment = 0
    while segment < num_segments:
        at = pair * num_segments + segment
        part = tl.load(values_ptr + at * head_width + d, mask=has_width, other=0.0)[None, :]
        largest, total, values = _merge(
            largest, total, values, tl.load(largest_ptr + at + one), tl.load(total_ptr + at + one), part
        )
        segment += 1
    out = tl.div_rn(values, total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair * head_width + d[None, :], out, mask=has_width[None, :])


def paged_attention(
    q_THD: Tensor,
    k_pages_NGBD: Tensor,
    v_pages_NGBD: Tensor,
    block_tables_SM: Tensor,
    sequence_T: Tensor,
    positions_T: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    key_offsets_S: Tensor | None = None,
    split: bool | None = None,
    step: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See reference.paged_attention. bfloat16 q and pages: the weights too are rounded to bfloat16 before V.

    out_dtype: the result's type; None: q's.
    split: a program for each segment of keys; step: tokens of a program. Neither changes a result; None: by the shapes.
    """
    (num_tokens, num_heads, head_width), (_, kv_heads, block_size, _) = q_THD.shape, k_pages_NGBD.shape
    assert k_pages_NGBD.is_contiguous()
    assert v_pages_NGBD.is_contiguous()
    assert k_pages_NGBD.dtype == v_pages_NGBD.dtype
    if q_THD.stride(2) != 1:
        q_THD = q_THD.contiguous()
    group = num_heads // kv_heads
    padded_group = tile_width(group, 1)
    block_m = max(16, padded_group)
    if step is None:  # as many sequences as tokens: each token is a decode of its own
        step = 1 if num_tokens <= block_tables_SM.shape[0] else block_m // padded_group
    programs = triton.cdiv(num_tokens, step) * kv_heads
    num_segments = triton.cdiv(block_tables_SM.shape[1] * block_size, _SEGMENT)
    if split is None:
        split = num_segments > 1 and programs < _FEW_PROGRAMS
    out_THD = torch.empty(num_tokens, num_heads, head_width, dtype=out_dtype or q_THD.dtype, device=q_THD.device)
    parts = [None] * 3
    if split:
        shape = (num_tokens, num_heads, num_segments)
        sizes = (shape, shape, (*shape, head_width))
        parts = [torch.empty(size, device=q_THD.device) for size in sizes]  # type: ignore[misc]
    block_d = tile_width(head_width)
    _attention_kernel[(triton.cdiv(num_tokens, step), kv_heads, num_segments if split else 1)](
        q_THD, k_pages_NGBD, v_pages_NGBD, block_tables_SM.contiguous(), sequence_T, positions_T, key_offsets_S,
        out_THD, *parts, num_tokens, num_heads, group, head_width, block_tables_SM.shape[1], k_pages_NGBD.stride(0),
        k_pages_NGBD.stride(1), q_THD.stride(0), q_THD.stride(1), scale, sliding_window, softcap, num_segments,
        STEP=step, SPLIT=split, SEGMENT=_SEGMENT, BLOCK_SIZE=block_size, SOFTCAP=softcap != 0,
        WINDOW=sliding_window != 0, OFFSETS=key_offsets_S is not None, PRODUCT=product_dtype(q_THD, k_pages_NGBD),
        GROUP=padded_group, BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        _merge_kernel[(num_tokens * num_heads,)](
            out_THD, *parts, head_width, num_segments, BLOCK_D=block_d, num_warps=1, enable_fp_fusion=False
        )
    return out_THD
