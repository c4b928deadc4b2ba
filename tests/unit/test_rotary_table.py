"""Rotary tables against the modules of transformers whose place they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from polyhead_server.engine.rotary_table import RotaryTable

LENGTH = 256


def rotary_module(**rope: Any) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=64,
            rope_parameters={"rope_theta": 10_000.0, **rope},
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_a_table_holds_what_the_module_gives(dtype: torch.dtype, rope: dict[str, Any]) -> None:
    rotary, hidden = rotary_module(**rope), torch.zeros(1, 1, 64, dtype=dtype)
    table = RotaryTable.of(rotary, hidden, LENGTH)
    assert table is not None
    positions = torch.randint(0, LENGTH, (1, 9), generator=torch.Generator().manual_seed(0))
    for found, expected in zip(
        table(hidden, position_ids=positions), rotary(hidden, position_ids=positions), strict=True
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_positions_that_depend_on_others_have_no_table() -> None:
    rotary = rotary_module(rope_type="dynamic", factor=4.0)
    assert RotaryTable.of(rotary, torch.zeros(1, 1, 64), LENGTH) is None


def test_no_table_of_many_positions_and_one_of_a_single_one() -> None:
    rotary, hidden = rotary_module(rope_type="default"), torch.zeros(1, 1, 64)
    assert RotaryTable.of(rotary, hidden, 1 << 31) is None
    assert RotaryTable.of(rotary, hidden, 1) is not None
