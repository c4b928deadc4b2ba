"""The arithmetic and the turns of the deployment-cost benchmark: what it prints as computed rests on these."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from polyhead_core.backbone import load_backbone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


def test_the_fine_tune_with_most_waiting_requests_is_next(module: Any) -> None:
    turns = module("cost_load").Turns()
    for request, name in enumerate(["a", "b", "b", "c", "c"]):
        assert not turns.ask(name, request)
    assert list(turns.next_turn()) == [1, 2]  # b has waited longer than c
    assert turns.ask("b", 5), "what arrives for the running one joins it"
    assert not turns.ask("a", 6)
    assert list(turns.next_turn()) == [0, 6]
    assert list(turns.next_turn()) == [3, 4]
    assert list(turns.next_turn()) == []
    assert turns.num_turns == 3


@pytest.mark.parametrize(
    ("memory_bytes", "demand", "expected"),
    [(1, 0.0, 1), (800, 100.0, 1), (801, 100.0, 2), (1, 100.1, 2), (1601, 250.0, 3)],
)
def test_machines_are_whole_and_serve_memory_and_demand(
    module: Any, memory_bytes: int, demand: float, expected: int
) -> None:
    table = module("cost_table")
    machine = table.Machine(price_per_hour=2.0, memory_bytes=1000, usable=0.8)
    found = table.cost(machine, 4, memory_bytes, demand, 100.0)
    assert found.machines == expected
    assert found.per_month == expected * 2.0 * 730
    assert found.per_month_per_fine_tune == found.per_month / 4


def test_counted_int8_bytes_are_those_of_a_loaded_backbone(module: Any, tmp_path: Path) -> None:
    for kind in ("llama", "llama-untied"):
        directory = tiny.save_backbone(kind, tmp_path / kind, attention_bias=False, mlp_bias=False)
        backbone = load_backbone(str(directory), cache_dir=tmp_path / "cache")
        assert module("cost_bytes").shape_bytes(backbone.model.config).int8 == backbone.num_bytes


def test_llama_2_7b_counts(module: Any) -> None:
    counted = module("cost_bytes").shape_bytes(module("cost_bytes").LLAMA_2_7B)
    assert counted.parameters == 6_738_415_616
    assert counted.adapters["rank 8 on q, v"] == 2 * 4_194_304  # LoRA's parameters in bfloat16


def test_merging_adds_the_adapter_to_the_weights(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_CACHE", str(tmp_path / "cache"))
    directory = tiny.save_backbone("llama", tmp_path / "llama")
    adapters = module("cost_adapters")
    adapters.AdapterWriter(directory, tmp_path / "templates", [4], 0).write(tmp_path / "adapter", 0)
    merger = module("cost_merge").Merger(str(directory))
    merged = merger.dedicated(tmp_path / "adapter")
    deltas = adapters.lora_deltas(tmp_path / "adapter")
    assert len(deltas) == 3 * 7
    for path, (a_RI, b_OR) in deltas.items():
        before, after = (m.model.get_submodule(path).dequantize() for m in (merger.int8, merged))
        layer = merged.model.get_submodule(path)
        step_OI = (layer.SCB / 127).unsqueeze(1) / layer.input_scale
        # Either weight is at most half a quantisation step off, and the merged one started from bfloat16.
        bound_OI = 1.5 * step_OI + before.abs() / 128
        assert torch.all((after - before - b_OR @ a_RI).abs() <= bound_OI), path
