"""The adapters' products over rank pages: y[t] += B (A x[t]) with each row's own adapter, whatever its rank.

Shapes: T rows, I width, O outputs, P pages of an adapter, C chunks of the width. A program takes STEP rows that stand
together and goes through their runs of one slot: with STEP = 1 it is a gather per row (BGMV, Punica, Chen et al. 2023),
with 16 and rows that stand sorted by slot a product per segment (SGMV), which reads a page once for the run. Both are
the same code on the same tile of 16 rows, of which those outside the run are masked, so a row's sums are taken in an
order that depends on the width alone. Rows with slot -1 are not touched. Up to three sites that read the same x and
whose outputs lie side by side (q, k and v; gate and up) are parts of one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables
from polyhead_core.kernels.triton.arithmetic import product_dtype, tile_width

_RANKS = tl.constexpr(RANKS_PER_PAGE)
_UNIT = tl.constexpr(UNIT)
_CHUNK = 512
"""Width that one program sums up; the chunks' sums are then added in one fixed tree."""
_FEW_ROWS = 64
_BLOCK_T = 16
_BLOCK_I = 128
_BLOCK_O = 128
MAX_PARTS = 3


@dataclass(frozen=True, kw_only=True)
class SitePart:
    """The columns [begin, begin + width) of y, which belong to a site."""

    site: int
    begin: int
    width: int


@triton.jit
def _chosen(part, first, second, third):
    """The part's own of three numbers."""
    return tl.where(part == 0, first, tl.where(part == 1, second, third))


@triton.jit
def _run_end(slots_ptr, first, limit):
    """The row after the last one from `first` on that has the same slot."""
    slot = tl.load(slots_ptr + first)
    end = first + 1
    while tl.load(slots_ptr + end, mask=end < limit, other=-2) == slot:
        end += 1
    return end


@triton.jit(do_not_specialize=["num_rows", "site_0", "site_1", "site_2"])
def _shrink_kernel(
    x_ptr, arena_ptr, num_pages_ptr, pages_ptr, slots_ptr, partial_ptr,
    num_rows, width, site_0, site_1, site_2, num_parts, num_sites, max_pages, num_chunks,
    STEP: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """partial[t, part, p, c] = A_p x[t] over the columns of chunk c: [RANKS]."""
    first = tl.program_id(0) * STEP
    part, page, chunk = tl.program_id(1) // max_pages, tl.program_id(1) % max_pages, tl.program_id(2)
    site = _chosen(part, site_0, site_1, site_2)
    rows = first + tl.arange(0, BLOCK_T)
    limit = tl.minimum(first + STEP, num_rows)
    r = tl.arange(0, _RANKS)
    while first < limit:
        slot = tl.load(slots_ptr + first)
        end = _run_end(slots_ptr, first, limit)
        count = tl.load(num_pages_ptr + slot * num_sites + site, mask=slot >= 0, other=0)
        if page < count:
            unit = tl.load(pages_ptr + ((slot * num_sites + site).to(tl.int64) * max_pages + page) * 2)
            a_ptr = arena_ptr + unit.to(tl.int64) * _UNIT
            mine = (rows >= first) & (rows < end)
            sums = tl.zeros((BLOCK_T, _RANKS), dtype=tl.float32)
            for start in tl.static_range(0, CHUNK, BLOCK_I):
                i = chunk * CHUNK + start + tl.arange(0, BLOCK_I)
                inside = i < width
                x = tl.load(
                    x_ptr + rows.to(tl.int64)[:, None] * width + i[None, :], mask=mine[:, None] & inside[None, :],
                    other=0.0,
                )  # fmt: skip
                a = tl.load(a_ptr + r[:, None] * width + i[None, :], mask=inside[None, :], other=0.0)
                sums = tl.dot(x.to(PRODUCT), tl.trans(a).to(PRODUCT), sums, input_precision="ieee")
            at = ((rows.to(tl.int64) * num_parts + part) * max_pages + page) * num_chunks + chunk
            tl.store(partial_ptr + at[:, None] * _RANKS + r[None, :], sums, mask=mine[:, None])
        first = end


@triton.jit(do_not_specialize=["num_rows", "site_0", "site_1", "site_2"])
def _expand_kernel(
    y_ptr, arena_ptr, num_pages_ptr, pages_ptr, bias_ptr, slots_ptr, partial_ptr,
    num_rows, stride, site_0, site_1, site_2, begin_0, begin_1, begin_2, width_0, width_1, width_2,
    num_parts, num_sites, max_pages, num_chunks,
    STEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[t] += sum over p of B_p^T (sum over c of partial[t, part, p, c]), plus the slot's bias, part by part."""
    first = tl.program_id(0) * STEP
    blocks_0, blocks_1 = tl.cdiv(width_0, BLOCK_O), tl.cdiv(width_1, BLOCK_O)
    block = tl.program_id(1)
    part = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    site = _chosen(part, site_0, site_1, site_2)
    num_outputs, begin = _chosen(part, width_0, width_1, width_2), _chosen(part, begin_0, begin_1, begin_2)
    outputs = (block - _chosen(part, 0, blocks_0, blocks_0 + blocks_1)) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = first + tl.arange(0, BLOCK_T)
    limit = tl.minimum(first + STEP, num_rows)
    inside = outputs < num_outputs
    chunks = tl.arange(0, BLOCK_C)
    while first < limit:
        slot = tl.load(slots_ptr + first)
        end = _run_end(slots_ptr, first, limit)
        entry = slot * num_sites + site
        count = tl.load(num_pages_ptr + entry, mask=slot >= 0, other=0)
        bias_unit = tl.load(bias_ptr + entry, mask=slot >= 0, other=-1)
        if (count > 0) | (bias_unit >= 0):
            mine = (rows >= first) & (rows < end)
            sums = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
            page = 0
            while page < count:
                unit = tl.load(pages_ptr + (entry.to(tl.int64) * max_pages + page) * 2 + 1)
                b_ptr = arena_ptr + unit.to(tl.int64) * _UNIT
                at = ((rows.to(tl.int64) * num_parts + part) * max_pages + page) * num_chunks
                for r in tl.static_range(_RANKS):
                    v = tl.load(
                        partial_ptr + (at[:, None] + chunks[None, :]) * _RANKS + r,
                        mask=mine[:, None] & (chunks < num_chunks)[None, :], other=0.0,
                    )  # fmt: skip
                    b = tl.load(b_ptr + r * num_outputs + outputs, mask=inside, other=0.0).to(tl.float32)
                    sums += tl.sum(v, axis=1)[:, None] * b[None, :]
                page += 1
            if bias_unit >= 0:
                bias = tl.load(arena_ptr + bias_unit.to(tl.int64) * _UNIT + outputs, mask=inside, other=0.0)
                sums += bias.to(tl.float32)[None, :]
            at_y = y_ptr + rows.to(tl.int64)[:, None] * stride + (begin + outputs)[None, :]
            here = mine[:, None] & inside[None, :]
            y = tl.load(at_y, mask=here, other=0.0).to(tl.float32)
            tl.store(at_y, (y + sums).to(y_ptr.dtype.element_ty), mask=here)
        first = end


@triton.jit(do_not_specialize=["site"])
def _embedding_kernel(
    y_ptr, tokens_ptr, arena_ptr, num_pages_ptr, pages_ptr, slots_ptr,
    num_outputs, site, num_sites, max_pages, BLOCK_O: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = outputs < num_outputs
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        entry = slot * num_sites + site
        token = tl.load(tokens_ptr + row).to(tl.int64)
        sums = tl.zeros((BLOCK_O,), dtype=tl.float32)
        page = 0
        count = tl.load(num_pages_ptr + entry)
        while page < count:
            units_ptr = pages_ptr + (entry.to(tl.int64) * max_pages + page) * 2
            a_ptr = arena_ptr + tl.load(units_ptr).to(tl.int64) * _UNIT + token * _RANKS
            b_ptr = arena_ptr + tl.load(units_ptr + 1).to(tl.int64) * _UNIT
            for r in tl.static_range(_RANKS):
                b = tl.load(b_ptr + r * num_outputs + outputs, mask=inside, other=0.0).to(tl.float32)
                sums += tl.load(a_ptr + r).to(tl.float32) * b
            page += 1
        at_y = y_ptr + row * num_outputs + outputs
        y = tl.load(at_y, mask=inside, other=0.0).to(tl.float32)
        tl.store(at_y, (y + sums).to(y_ptr.dtype.element_ty), mask=inside)


def low_rank_add(
    y_TO: Tensor, x_TI: Tensor, tables: AdapterTables, site: int, slots_T: Tensor, by_segment: bool | None = None
) -> None:
    """See reference.low_rank_add, and low_rank_add_parts."""
    part = SitePart(site=site, begin=0, width=y_TO.shape[1])
    low_rank_add_parts(y_TO, x_TI, tables, [part], slots_T, by_segment)


def low_rank_add_parts(
    y_TO: Tensor,
    x_TI: Tensor,
    tables: AdapterTables,
    parts: Sequence[SitePart],
    slots_T: Tensor,
    by_segment: bool | None = None,
) -> None:
    """reference.low_rank_add at each part's columns of y; y of any float type is rounded once, after pages and bias.

    by_segment: tiles of 16 rows, each of which takes its runs of one slot one after another; False: a program per row;
    None: tiles from more than _FEW_ROWS rows on. A step's rows stand sorted by slot (engine/batch.py), so runs are long
    in a prefill and where many rows share adapters, and a tile reads an adapter once; the head's rows alone are in the
    requests' order. The choice changes who reads what, and no result.
    """
    num_rows, width = x_TI.shape
    if num_rows == 0:
        return
    assert y_TO.is_contiguous()
    assert 0 < len(parts) <= MAX_PARTS
    segments = num_rows > _FEW_ROWS if by_segment is None else by_segment
    step = _BLOCK_T if segments else 1
    num_sites, max_pages = tables.pages.shape[1], tables.pages.shape[2]
    num_chunks = triton.cdiv(width, _CHUNK)
    tiles, num_parts = triton.cdiv(num_rows, step), len(parts)
    padded = [*parts, *[SitePart(site=0, begin=0, width=0)] * (MAX_PARTS - num_parts)]
    sites = [part.site for part in padded]
    partial_TPCR = torch.empty(num_rows, num_parts * max_pages, num_chunks, RANKS_PER_PAGE, device=x_TI.device)
    _shrink_kernel[(tiles, num_parts * max_pages, num_chunks)](
        x_TI.contiguous(), tables.arena, tables.num_pages, tables.pages, slots_T.contiguous(), partial_TPCR,
        num_rows, width, *sites, num_parts, num_sites, max_pages, num_chunks,
        STEP=step, PRODUCT=product_dtype(x_TI, tables.arena),
        BLOCK_T=_BLOCK_T, CHUNK=_CHUNK, BLOCK_I=_BLOCK_I, num_warps=2,
    )  # fmt: skip
    _expand_kernel[(tiles, sum(triton.cdiv(part.width, _BLOCK_O) for part in parts))](
        y_TO, tables.arena, tables.num_pages, tables.pages, tables.bias, slots_T.contiguous(), partial_TPCR,
        num_rows, y_TO.stride(0), *sites, *[part.begin for part in padded], *[part.width for part in padded],
        num_parts, num_sites, max_pages, num_chunks,
        STEP=step, BLOCK_T=_BLOCK_T, BLOCK_O=_BLOCK_O, BLOCK_C=tile_width(num_chunks, 1), num_warps=4,
    )  # fmt: skip


def embedding_add(y_TO: Tensor, token_ids_T: Tensor, tables: AdapterTables, site: int, slots_T: Tensor) -> None:
    """See reference.embedding_add; y of any float type is rounded once."""
    num_rows, num_outputs = y_TO.shape
    if num_rows == 0:
        return
    assert y_TO.is_contiguous()
    num_sites, max_pages = tables.pages.shape[1], tables.pages.shape[2]
    _embedding_kernel[(num_rows, triton.cdiv(num_outputs, _BLOCK_O))](
        y_TO, token_ids_T.contiguous(), tables.arena, tables.num_pages, tables.pages, slots_T.contiguous(),
        num_outputs, site, num_sites, max_pages, BLOCK_O=_BLOCK_O, num_warps=4,
    )  # fmt: skip
