"""An adapter laid out as the arena wants it: all its pages, rounded up to units, in one host buffer."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead_core.errors import AdapterFormatError
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT
from polyhead_core.sites import SiteKind, SiteMap
from polyhead_server.adapters.base import BiasDelta, Contribution, HostAdapter


class Part(enum.Enum):
    A = "a"
    B = "b"
    BIAS = "bias"


@dataclass(frozen=True)
class Extent:
    """One run of units, and what of which site it holds."""

    site: int
    part: Part
    page: int
    num_units: int


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    content_hash: str
    peft_type: str
    max_rank: int
    num_parameters: int
    file_bytes: int
    extents: tuple[Extent, ...]
    units: Tensor  # [sum of the extents' units, UNIT] in the pool's type, on the host

    @property
    def sizes(self) -> list[int]:
        """The extents' sizes in units, in order."""
        return [extent.num_units for extent in self.extents]

    @property
    def num_units(self) -> int:
        return int(self.units.shape[0])

    @property
    def num_bytes(self) -> int:
        return self.units.nbytes


@dataclass(frozen=True)
class TableRow:
    """What the page tables hold for one slot."""

    num_pages: Tensor  # [num_sites] int32
    pages: Tensor  # [num_sites, max_pages, 2] int32
    bias: Tensor  # [num_sites] int32


def pack(adapter: HostAdapter, dtype: torch.dtype, *, pin_memory: bool = False) -> PackedAdapter:
    """Raises AdapterFormatError for numbers that are too large for `dtype`."""
    parts = [part for contribution in adapter.contributions for part in _parts(contribution)]
    sizes = [num_units(values.numel()) for _, _, _, values in parts]
    units = torch.zeros(sum(sizes), UNIT, dtype=dtype, pin_memory=pin_memory)
    flat, start = units.view(-1), 0
    for size, (_, _, _, values) in zip(sizes, parts, strict=True):
        flat[start : start + values.numel()].view(values.shape).copy_(values)
        start += size * UNIT
    if not bool(torch.isfinite(units).all()):
        raise AdapterFormatError(
            f"adapter {adapter.content_hash[:12]} holds numbers that {dtype} cannot hold; its training has diverged",
            details={"content_hash": adapter.content_hash},
        )
    return PackedAdapter(
        content_hash=adapter.content_hash,
        peft_type=adapter.peft_type,
        max_rank=adapter.max_rank,
        num_parameters=adapter.num_parameters,
        file_bytes=adapter.file_bytes,
        extents=tuple(Extent(s, part, page, size) for (s, part, page, _), size in zip(parts, sizes, strict=True)),
        units=units,
    )


def num_units(num_elements: int) -> int:
    return -(-num_elements // UNIT)


class Run(NamedTuple):
    """Extents that lie one behind the other in the arena as in the adapter."""

    start: int
    """First unit in the arena."""
    first: int
    """First unit in the adapter."""
    num_units: int


def joined_extents(starts: Sequence[int], sizes: Sequence[int]) -> list[Run]:
    """The fewest runs that extents of these sizes, laid at these units of the arena, make; in order."""
    runs: list[Run] = []
    first = 0
    for start, size in zip(starts, sizes, strict=True):
        if runs and runs[-1].start + runs[-1].num_units == start:
            runs[-1] = runs[-1]._replace(num_units=runs[-1].num_units + size)
        else:
            runs.append(Run(start, first, size))
        first += size
    return runs


def table_row(adapter: PackedAdapter, starts: Sequence[int], sites: SiteMap, max_pages: int) -> TableRow:
    """The tables' row of an adapter whose extents lie at these units."""
    num_pages = torch.zeros(len(sites), dtype=torch.int32)
    pages = torch.zeros(len(sites), max_pages, 2, dtype=torch.int32)
    bias = torch.full((len(sites),), -1, dtype=torch.int32)
    num_pages_, pages_, bias_ = num_pages.numpy(), pages.numpy(), bias.numpy()
    for extent, start in zip(adapter.extents, starts, strict=True):
        if extent.part is Part.BIAS:
            bias_[extent.site] = start
        else:
            pages_[extent.site, extent.page, 0 if extent.part is Part.A else 1] = start
            num_pages_[extent.site] = max(num_pages_[extent.site], extent.page + 1)
    return TableRow(num_pages, pages, bias)


def _parts(contribution: Contribution) -> list[tuple[int, Part, int, Tensor]]:
    """(site, part, page, values) of everything that a contribution lays into the arena."""
    site = contribution.site
    if isinstance(contribution, BiasDelta):
        return [(site.index, Part.BIAS, 0, contribution.bias)]
    a_parts, b_parts = [], []  # in this order they are read
    for page, first in enumerate(range(0, contribution.rank, RANKS_PER_PAGE)):
        a_RI = _full_page(contribution.a[first : first + RANKS_PER_PAGE])
        b_RO = _full_page(contribution.b[:, first : first + RANKS_PER_PAGE].T)
        # The embedding's page is read by token: one row of eight ranks each.
        a_parts.append((site.index, Part.A, page, a_RI.T if site.kind is SiteKind.EMBED else a_RI))
        b_parts.append((site.index, Part.B, page, b_RO))
    return a_parts + b_parts


def _full_page(rows_RX: Tensor) -> Tensor:
    """[up to 8, x] filled up with rows of zeros."""
    missing = RANKS_PER_PAGE - rows_RX.shape[0]
    return torch.nn.functional.pad(rows_RX, (0, 0, 0, missing)) if missing else rows_RX
