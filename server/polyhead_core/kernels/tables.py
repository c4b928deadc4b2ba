"""Where the weights of the resident adapters lie: the arena and its page tables, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANKS_PER_PAGE = 8
"""Ranks in one page; an adapter of rank r takes ceil(r / 8) pages at a site, the last one filled up with zeros."""
UNIT = 64
"""Elements in one arena unit; every extent starts at a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class AdapterTables:
    """Written by the adapter pool at step boundaries, read by the kernels.

    At a linear site page p of a slot adds to a row x of that slot: y += B_p^T (A_p x), with A_p [8, in], B_p [8, out]
    (the adapter's scale is already in B_p). At an embedding site A_p is [vocab, 8]: y += B_p^T A_p[token].
    """

    arena: Tensor  # [num_units * UNIT] float32 or bfloat16
    num_pages: Tensor  # [num_slots, num_sites] int32: rank pages of the slot's adapter at the site
    pages: Tensor  # [num_slots, num_sites, max_pages, 2] int32: units where A_p and B_p start
    bias: Tensor  # [num_slots, num_sites] int32: unit where a [out] bias to add starts; -1: none
    acts: Tensor  # [num_slots, num_sites] bool, on the host: whether the slot has pages or a bias at the site

    @classmethod
    def without_adapters(cls, num_sites: int, device: torch.device) -> AdapterTables:
        """For rows of slot -1 alone."""
        return cls(
            arena=torch.zeros(UNIT, device=device),
            num_pages=torch.zeros(1, num_sites, dtype=torch.int32, device=device),
            pages=torch.zeros(1, num_sites, 1, 2, dtype=torch.int32, device=device),
            bias=torch.full((1, num_sites), -1, dtype=torch.int32, device=device),
            acts=torch.zeros(1, num_sites, dtype=torch.bool),
        )
