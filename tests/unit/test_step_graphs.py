"""Decode steps that are recorded once for each size: with a recorder that computes again in place of replaying."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from local_engine import LocalEngine, local_engine
from polyhead_server.engine.batch import BatchRow
from polyhead_server.engine.runner import Runner, _sizes_to_meet
from polyhead_server.engine.step_graphs import SIZES, CudaRecorder, StepGraphs
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


def test_sizes_are_recorded_before_the_first_request(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its context and its adapters' sites among the linear layers, no request records a size of its own."""
    for module in ("step_graphs", "runner"):
        monkeypatch.setattr(f"polyhead_server.engine.{module}.SEGMENT", 64)
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    runner.warm_up(9, engine.store.tables, max_tokens=20, max_context=128)
    assert recorder.recorded == len([1, 2, 4, 8, 16]) * len([64, 128]) * len(["plain", "adapted"])
    recorded = recorder.recorded
    names = [None, "all", "few", None, "all", "few", None]
    asked = [engine.submit([7, 8, 9 + row], name, max_tokens=4) for row, name in enumerate(names)]
    asked += [engine.submit([7] * length, name, max_tokens=2) for length, name in ((60, "few"), (70, None))]
    assert all(answer.tokens() for answer in asked)
    assert recorder.recorded == recorded


def test_the_sizes_that_serving_will_meet() -> None:
    sizes = list(_sizes_to_meet(9, 600, 1500))
    for adapted in (False, True):
        found = [(one.rows, one.tokens_a_row, one.context) for one in sizes if one.adapted is adapted]
        decodes = [(rows, 1, 512) for rows in (16, 8, 4, 2, 1)]
        prefills = [(1, tokens, tokens) for tokens in (2, 4, 8, 16, 32, 64, 128, 256, 512, 600)]
        long = [(rows, tokens, c) for c in (1024, 1500) for rows, tokens in [(r, 1) for r, _, _ in decodes] + [(1, 2)]]
        assert found == decodes + prefills + long
    large = list(_sizes_to_meet(300, 64, 16))
    assert {one.rows for one in large if one.tokens_a_row == 1} == {*SIZES, 300}
    assert max(one.context for one in large) == 16
    assert max(one.rows * one.tokens_a_row for one in large if one.tokens_a_row > 1) == 64


def test_the_time_before_the_first_request_is_bounded(engine: LocalEngine, caplog: pytest.LogCaptureFixture) -> None:
    runner: Runner = engine.engine._runner
    recorder = ComputesAgain()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    runner.warm_up(9, engine.store.tables, max_tokens=20, max_context=128, limit_s=0.0)
    assert recorder.recorded <= 1
    assert "sizes of steps are met before the first request" in caplog.text


def test_without_room_for_more_recordings_those_that_are_there_go_on(
    engine: LocalEngine, caplog: pytest.LogCaptureFixture
) -> None:
    class HasRoomForOne(ComputesAgain):
        def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            if self.recorded:
                raise torch.OutOfMemoryError("0 MiB of the device's memory are left")
            return super().record(run)

    plain = answers(engine)
    runner: Runner = engine.engine._runner
    recorder = HasRoomForOne()
    runner.graphs = StepGraphs(runner._logits, recorder, CPU)
    assert answers(engine) == plain
    assert recorder.recorded == 1
    assert [record.message for record in caplog.records if "no further decode steps" in record.message]
    one_row = runner.prepare([BatchRow(token_ids=[1], start=0, block_ids=[0], slot=-1)], engine.store.tables)
    assert runner.graphs.fits(one_row), "a size that was recorded is still replayed"


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


class FakeCuda:
    """torch.cuda's streams, graphs and memory as far as a recorder asks for them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, invalidated: bool = False, free_bytes: int = 1 << 30
    ) -> None:
        self.main = FakeStream()
        self.current: object = self.main
        self._invalidated = invalidated
        functions = {
            "graph_pool_handle": lambda: (0, 0),
            "current_stream": lambda _device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "Stream": lambda _device: FakeStream(),
            "stream": self._on,
            "CUDAGraph": FakeGraph,
            "graph": self._captures,
            "mem_get_info": lambda _device: (free_bytes, 80 << 30),
            "memory_reserved": lambda _device: 0,
            "memory_allocated": lambda _device: 0,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)

    @contextlib.contextmanager
    def _on(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _captures(self, _graph: object, **_settings: object) -> Iterator[None]:
        """As torch.cuda.graph: where ending the capture raises, its stream stays the current one."""
        before, self.current = self.current, FakeStream()
        yield
        if self._invalidated:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before


class FakeStream:
    def wait_stream(self, _other: object) -> None:
        pass


class FakeGraph:
    def replay(self) -> None:
        pass


def test_after_a_capture_that_was_invalidated_the_step_runs_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, invalidated=True)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaRecorder(CPU).record(lambda: torch.ones(2, 3))
    assert cuda.current is cuda.main


def test_recordings_leave_their_results_at_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, recorder = FakeCuda(monkeypatch), CudaRecorder(CPU)
    large, small = (recorder.record(lambda rows=rows: torch.full((rows, 3), float(rows))) for rows in (4, 2))
    assert cuda.current is cuda.main
    assert large().shape == (4, 3)
    assert small().tolist() == [[2.0] * 3] * 2
    assert small().data_ptr() == large().data_ptr()
    larger = recorder.record(lambda: torch.full((5, 3), 5.0))
    assert larger().tolist() == [[5.0] * 3] * 5
    assert small().tolist() == [[2.0] * 3] * 2


def test_a_device_that_is_nearly_full_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, free_bytes=1 << 20)
    with pytest.raises(torch.OutOfMemoryError, match="1 MiB"):
        CudaRecorder(CPU).record(lambda: torch.ones(1))
