"""A step's batch: where its tensors lie on the device, and the order of its rows and of their logits."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import random_tables
from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.engine.batch import BatchRow, StepBatch, build_batch
from polyhead_server.kvcache.pool import KVPool, KVShape

CPU = torch.device("cpu")
TENSORS = [
    "token_ids", "positions", "sequence", "block_tables", "slot_mapping", "adapter_slots", "logit_rows", "logit_slots",
]  # fmt: skip


@pytest.fixture(scope="module")
def kv() -> KVPool:
    return KVPool(KVShape(layers=((1, 8),), block_size=4, dtype=torch.float32), 1 << 16, CPU)


@pytest.fixture(scope="module")
def tables() -> AdapterTables:
    return random_tables(0, 8, 8, torch.float32, device=CPU)


def random_rows(draw: random.Random, kv: KVPool) -> list[BatchRow]:
    rows = []
    for _ in range(draw.randrange(1, 8)):
        start, length = draw.randrange(9), draw.randrange(1, 6)
        blocks = tuple(draw.randrange(kv.num_blocks) for _ in range(-(-(start + length) // 4)))
        ids = [draw.randrange(100) for _ in range(length)]
        slot, logits = draw.randrange(-1, 4), draw.randrange(length + 1)
        rows.append(BatchRow(token_ids=ids, start=start, block_ids=blocks, slot=slot, num_logits=logits))
    return rows


def assert_same(first: StepBatch, second: StepBatch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("seed", range(8))
def test_in_one_piece_every_tensor_starts_at_a_multiple_of_16_bytes(
    seed: int, kv: KVPool, tables: AdapterTables
) -> None:
    draw = random.Random(seed)
    batch = build_batch(random_rows(draw, kv), tables, kv)
    packed = batch.in_one_piece(CPU)
    assert packed.flat is not None
    assert_same(packed, batch)
    for name in TENSORS:
        offset = getattr(packed, name).data_ptr() - packed.flat.data_ptr()
        assert offset % 16 == 0, name
    other = build_batch([*random_rows(random.Random(seed), kv)], tables, kv)
    other.token_ids.add_(1)
    other.logit_slots.sub_(1)
    packed.take_over(other)
    assert_same(packed, other)


@pytest.mark.parametrize("seed", range(8))
def test_rows_stand_sorted_by_slot_and_their_logits_in_order(seed: int, kv: KVPool, tables: AdapterTables) -> None:
    rows = random_rows(random.Random(seed), kv)
    batch = build_batch(rows, tables, kv)
    assert batch.adapter_slots.tolist() == sorted(batch.adapter_slots.tolist())
    wanted = [(row, at) for row in rows for at in range(len(row.token_ids) - row.num_logits, len(row.token_ids))]
    assert len(wanted) == len(batch.logit_rows) == len(batch.logit_slots)
    for (row, at), place, slot in zip(wanted, batch.logit_rows.tolist(), batch.logit_slots.tolist(), strict=True):
        assert batch.token_ids[place] == row.token_ids[at]
        position = row.start + at
        assert batch.positions[place] == position
        assert batch.adapter_slots[place] == slot == row.slot
        blocks = batch.block_tables[batch.sequence[place]].tolist()
        assert tuple(blocks[: len(row.block_ids)]) == row.block_ids
        assert batch.slot_mapping[place] == row.block_ids[position // 4] * 4 + position % 4
