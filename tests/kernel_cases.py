"""Random inputs for the kernels' tests: int8 layers, adapter tables, paged keys and values."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils import cpp_extension

from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_compiler = pytest.mark.skipif(
    shutil.which(cpp_extension.get_cxx_compiler()) is None, reason="no C++ compiler: only the reference runs"
)
"""By the compiler, not by whether the kernels could be built: sources that do not compile are to fail."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def integer(generator: torch.Generator, least: int, limit: int) -> int:
    return int(torch.randint(least, limit, (1,), generator=generator))


def random_layer(generator: torch.Generator, width: int, out: int, device: torch.device = DEVICE) -> Int8Linear:
    """With a bias where `out` is odd, smoothing where `width` is odd, outlier columns where it is at least 64."""
    weight = torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator) if out % 2 else None
    scale = torch.rand(width, generator=generator) + 0.5 if width % 2 else None
    columns = torch.randperm(width, generator=generator)[: width // 8].sort().values if width >= 64 else None
    return Int8Linear.from_weight(weight, bias, scale, columns).to(device)


def int8_arguments(layer: Int8Linear) -> tuple[torch.Tensor | None, ...]:
    return layer.weight, layer.SCB, layer.input_scale, layer.outlier_columns, layer.outlier_weight, layer.bias


def random_tables(
    seed: int, width: int, out: int, dtype: torch.dtype, slots: int = 4, device: torch.device = DEVICE
) -> AdapterTables:
    """Slot s has s pages at site 1 (of 2), scattered over the arena; odd slots have a bias."""
    generator = seeded(seed)
    a_units, b_units, bias_units = (-(-size // UNIT) for size in (RANKS_PER_PAGE * width, RANKS_PER_PAGE * out, out))
    extents = [(slot, page, part) for slot in range(slots) for page in range(slot) for part in (0, 1)]
    num_pages = torch.zeros(slots, 2, dtype=torch.int32)
    pages = torch.zeros(slots, 2, slots, 2, dtype=torch.int32)
    bias = torch.full((slots, 2), -1, dtype=torch.int32)
    unit = 0
    for index in torch.randperm(len(extents), generator=generator).tolist():
        slot, page, part = extents[index]
        pages[slot, 1, page, part] = unit
        unit += (a_units, b_units)[part]
    for slot in range(slots):
        num_pages[slot, 1] = slot
        if slot % 2:
            bias[slot, 1] = unit
            unit += bias_units
    arena = (torch.randn(unit * UNIT, generator=generator) / width**0.5).to(device, dtype)
    acts = (num_pages > 0) | (bias >= 0)
    return AdapterTables(
        arena=arena, num_pages=num_pages.to(device), pages=pages.to(device), bias=bias.to(device), acts=acts
    )


def joined_tables(tables: list[AdapterTables]) -> AdapterTables:
    """The sites of all of them, one behind the other, in one arena."""
    starts = [sum(one.arena.numel() for one in tables[:index]) // UNIT for index in range(len(tables))]
    shifted = [torch.where(one.bias >= 0, one.bias + start, -1) for one, start in zip(tables, starts, strict=True)]
    return AdapterTables(
        arena=torch.cat([one.arena for one in tables]),
        num_pages=torch.cat([one.num_pages for one in tables], dim=1),
        pages=torch.cat([one.pages + start for one, start in zip(tables, starts, strict=True)], dim=1),
        bias=torch.cat(shifted, dim=1),
        acts=torch.cat([one.acts for one in tables], dim=1),
    )


def random_slots(generator: torch.Generator, rows: int) -> torch.Tensor:
    return torch.randint(-1, 4, (rows,), generator=generator).to(DEVICE, torch.int32)


def random_pages(seed: int, tokens: int = 6) -> dict[str, torch.Tensor]:
    """Three sequences over shuffled blocks; the first half of the tokens stands in runs, the rest at random."""
    generator = seeded(seed)
    heads, groups, width, block, blocks = [(4, 2, 16, 8, 24), (9, 3, 64, 16, 12), (6, 2, 20, 4, 36)][seed % 3]
    tables = torch.randperm(blocks, generator=generator).to(torch.int32).view(3, blocks // 3)
    lengths = torch.randint(1, tables.shape[1] * block, (3,), generator=generator)
    sequence = torch.randint(0, 3, (tokens,), generator=generator)
    sequence[: tokens // 2] = sequence[: tokens // 2].sort().values
    positions = (torch.rand(tokens, generator=generator) * lengths[sequence]).long()
    return {
        "q": normal(generator, tokens, heads, width),
        "k": normal(generator, blocks, groups, block, width),
        "v": normal(generator, blocks, groups, block, width),
        "tables": tables.to(DEVICE),
        "sequence": sequence.to(DEVICE, torch.int32),
        "positions": positions.to(DEVICE),
    }


def with_keys_first(
    keys_NGBD: torch.Tensor, values_NGBD: torch.Tensor, tables_SM: torch.Tensor, offsets_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages in which each sequence's keys and values stand `offset` places earlier."""
    moved = keys_NGBD.clone(), values_NGBD.clone()
    block = keys_NGBD.shape[2]
    for blocks, offset in zip(tables_SM.long(), offsets_S.tolist(), strict=True):
        for source, target in zip((keys_NGBD, values_NGBD), moved, strict=True):
            line = source[blocks].transpose(0, 1).flatten(1, 2).roll(-offset, dims=1)  # [G, places, D]
            target[blocks] = line.unflatten(1, (len(blocks), block)).transpose(0, 1)
    return moved


def spoil_front(
    keys_NGBD: torch.Tensor, values_NGBD: torch.Tensor, tables_SM: torch.Tensor, offsets_S: torch.Tensor
) -> None:
    """NaN in front of each sequence's first key, where a block may hold anything."""
    block = keys_NGBD.shape[2]
    for blocks, offset in zip(tables_SM.tolist(), offsets_S.tolist(), strict=True):
        for place in range(offset):
            for pages in (keys_NGBD, values_NGBD):
                pages[blocks[place // block], :, place % block] = torch.nan
