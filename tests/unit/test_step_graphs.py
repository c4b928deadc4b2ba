"""Decode steps that are recorded once for each size: with a recorder that computes again in place of replaying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from local_engine import LocalEngine, local_engine
from polyhead_server.engine.runner import Runner
from polyhead_server.engine.step_graphs import SIZES, StepGraphs
from tiny import save_adapter, save_backbone

CPU = torch.device("cpu")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ComputesAgain:
    """In place of a graph: at each replay it runs what was recorded, which reads the recording's own inputs."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.recorded += 1
        run()
        return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    save_backbone("llama", folder / "backbone")
    save_adapter(folder / "backbone", folder / "adapters" / "all", seed=1, r=8, target_modules=LINEARS)
    save_adapter(folder / "backbone", folder / "adapters" / "few", seed=2, r=12, target_modules=["q_proj", "v_proj"])
    save_adapter(folder / "backbone", folder / "adapters" / "head", seed=3, r=4, target_modules=["lm_head", "q_proj"])
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[LocalEngine]:
    with local_engine(folder / "backbone", folder / "cache", adapters=folder / "adapters") as engine:
        yield engine


def answers(engine: LocalEngine) -> list[list[int]]:
    """Of rows that come and go: with several adapters, none, and lengths that cross a block and a segment of tables."""
    generator = torch.Generator().manual_seed(0)
    cases = [("all", 5, 30), (None, 3, 9), ("few", 17, 20), ("head", 9, 25), (None, 250, 15), ("all", 2, 3)]
    asked = [
        engine.submit(
            torch.randint(4, 280, (length,), generator=generator).tolist(), name, max_tokens=tokens, ignore_eos=True
        )
        for name, length, tokens in cases
    ]
    return [answer.tokens() for answer in asked]


def test_recorded_steps_give_the_same_tokens(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyhead_server.engine.step_graphs.SEGMENT", 64)
    plain = answers(engine)
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    assert answers(engine) == plain
    first = recorder.recorded
    assert first > 4
    assert answers(engine) == plain
    assert recorder.recorded == first, "sizes and sites that were met before are not recorded again"


def test_a_recording_with_adapters_looks_wherever_one_has_acted(engine: LocalEngine) -> None:
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    for name, recorded in ((None, 1), ("few", 2), ("few", 2), (None, 2), ("all", 3), ("few", 3), ("head", 4)):
        engine.submit([7, 8, 9], name, max_tokens=4).tokens()
        assert recorder.recorded == recorded, name


def test_sizes_are_recorded_before_the_first_request(engine: LocalEngine) -> None:
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    runner.warm_up(9, engine.store.tables)
    assert recorder.recorded == len([1, 2, 4, 8, 16])
    asked = [engine.submit([7, 8, 9 + row], max_tokens=4) for row in range(7)]
    assert all(answer.tokens() for answer in asked)
    assert recorder.recorded == 5


def test_prefill_large_steps_and_scores_are_not_recorded(engine: LocalEngine) -> None:
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    engine.submit([5] * 40, score_prompt=True, max_tokens=1).tokens()
    assert recorder.recorded == 0
    assert SIZES[-1] >= 256


def test_what_cannot_be_recorded_runs_as_it_is(engine: LocalEngine, caplog: pytest.LogCaptureFixture) -> None:
    class Refuses:
        def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    plain = answers(engine)
    runner: Runner = engine.engine._runner
    runner.graphs = StepGraphs(runner._logits, Refuses(), CPU)
    assert answers(engine) == plain
    warnings = [record.message for record in caplog.records if "without CUDA graphs" in record.message]
    assert len(warnings) == 1
    assert "not permitted when stream is capturing" in warnings[0]
