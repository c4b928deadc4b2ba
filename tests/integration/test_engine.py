"""The engine's edges: steps that fail, ends of every kind, draining. Without the wire, on a tiny backbone."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from local_engine import LocalEngine, local_engine
from polyhead_core.errors import Draining, EngineFailure, PromptTooLong, QueueFull, RequestCancelled
from polyhead_core.errors import RequestDeadlineExceeded as DeadlinePassed
from polyhead_server.engine.runner import Runner
from polyhead_server.request import FailedEvent, FinishReason
from tiny import save_adapter, save_backbone

PROMPT = list(range(10, 60))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    backbone = save_backbone("llama", root / "backbone")
    save_adapter(backbone, root / "adapters" / "a", seed=1, r=4, target_modules=["q_proj"])
    return {"source": backbone, "cache": root / "cache", "adapters": root / "adapters"}


@pytest.fixture(params=[False, True], ids=["", "returns early"])
def engine(
    folders: dict[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalEngine]:
    """Once as on a device whose steps go on while the engine hands out the last one's tokens."""
    monkeypatch.setattr(Runner, "returns_early", request.param)
    with local_engine(**folders, max_model_len=256, max_queued_requests=4) as local:
        yield local


def test_a_step_that_raises_fails_its_requests_and_no_other(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.submit(PROMPT, "a", max_tokens=5).tokens()
    forward = engine.engine._runner.forward

    def broken(batch: Any) -> torch.Tensor:
        monkeypatch.setattr(engine.engine._runner, "forward", forward)
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(engine.engine._runner, "forward", broken)
    with pytest.raises(EngineFailure, match="RuntimeError"):
        assert engine.submit(PROMPT, "a", max_tokens=5).finished
    assert engine.submit(PROMPT, "a", max_tokens=5).tokens() == expected


def test_a_lost_device_ends_the_engine(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    with (
        contextlib.suppress(AssertionError),
        local_engine(**folders) as engine,
    ):  # it misses a healthy engine at its end
        monkeypatch.setattr(engine.engine._runner, "forward", lost)
        monkeypatch.setattr(engine.engine._runner, "check_device", lost)
        with pytest.raises(EngineFailure):
            assert engine.submit(PROMPT, "a", max_tokens=5).finished
    assert not engine.engine.status().healthy


@pytest.mark.parametrize("kind", ["llama", "llama-untied"])
def test_an_adapter_with_peft_s_copies_of_embedding_and_head_is_served(tmp_path: Path, kind: str) -> None:
    backbone = save_backbone(kind, tmp_path / "backbone")
    for name, copies in (("with", "auto"), ("without", False)):
        save_adapter(
            backbone,
            tmp_path / "adapters" / name,
            seed=1,
            r=4,
            target_modules=["q_proj", "embed_tokens", "lm_head"],
            save_embedding_layers=copies,
        )
    with local_engine(backbone, tmp_path / "cache", adapters=tmp_path / "adapters") as engine:
        answers = [engine.submit(PROMPT, name, max_tokens=5).tokens() for name in ("with", "without")]
    assert answers[0] == answers[1]


def test_logits_that_are_not_numbers_fail_their_row_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.submit(PROMPT, None, max_tokens=5).tokens()
    forward = engine.engine._runner.forward

    def poisoned(batch: Any) -> torch.Tensor:
        logits = forward(batch).clone()
        logits[batch.logit_slots >= 0] = float("nan")
        return logits

    monkeypatch.setattr(engine.engine._runner, "forward", poisoned)
    good, bad = engine.submit(PROMPT, None, max_tokens=5), engine.submit(PROMPT, "a", max_tokens=5)
    scored = engine.submit(PROMPT, "a", score_prompt=True)
    for answer in (bad, scored):
        with pytest.raises(EngineFailure, match=r"'a' yields non-finite"):
            assert answer.finished
    assert good.tokens() == expected


def test_cancelling_mid_way_ends_at_once_and_only_once(engine: LocalEngine) -> None:
    answer = engine.submit(PROMPT, "a", max_tokens=200, ignore_eos=True)
    deadline_s = time.monotonic() + 30
    while len(answer.events) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    request_id = next(iter(engine.engine._live))
    engine.engine.cancel(request_id)
    engine.engine.cancel(request_id)
    assert answer.done.is_set()
    with pytest.raises(RequestCancelled):
        assert answer.finished
    assert engine.engine.status().kv_blocks_used == 0


def test_a_deadline_ends_a_running_request(engine: LocalEngine) -> None:
    answer = engine.submit(PROMPT, None, max_tokens=200, ignore_eos=True, deadline_s=time.monotonic() + 0.05)
    with pytest.raises(DeadlinePassed, match="output tokens"):
        assert answer.finished


def test_ends_by_length_stop_token_and_stop_string(engine: LocalEngine) -> None:
    free = engine.submit(PROMPT, None, max_tokens=12, ignore_eos=True)
    tokens, text = free.tokens(), free.text()
    assert free.finished.choices[0].reason is FinishReason.LENGTH
    at = next(i for i in range(1, 12) if tokens[i] not in tokens[:i])
    stopped = engine.submit(PROMPT, None, max_tokens=12, stop_token_ids=(tokens[at],), ignore_eos=True)
    assert stopped.tokens() == tokens[: at + 1]
    assert stopped.finished.choices[0].reason is FinishReason.STOP
    part = text[3:5]
    cut = engine.submit(PROMPT, None, max_tokens=12, stop=(part,), ignore_eos=True)
    assert cut.text() == text[: text.index(part)]
    assert cut.finished.choices[0].stop == part
    held = engine.submit(PROMPT, None, max_tokens=12, min_tokens=12, stop_token_ids=(tokens[at],), ignore_eos=True)
    assert tokens[at] not in held.tokens()[:11]


def test_tokens_that_are_handed_out_late_are_the_same(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of requests that end in every way, one of them while it is the only one left; none is lost or changed."""
    streams = []
    for early in (False, True):
        monkeypatch.setattr(Runner, "returns_early", early)
        with local_engine(**folders, max_batch_rows=4) as engine:
            free = engine.submit(PROMPT, "a", max_tokens=12, ignore_eos=True).text()
            answers = [
                engine.submit(PROMPT, "a", max_tokens=12, ignore_eos=True, stop=(free[4:6],)),
                engine.submit(PROMPT, None, max_tokens=9, n=3, temperature=1.0, seed=4, logprobs=2),
                engine.submit(PROMPT[:20], "a", score_prompt=True),
                engine.submit(PROMPT[3:], None, max_tokens=1),
                engine.submit(PROMPT[5:], "a", max_tokens=30, temperature=2.0, seed=1),
                engine.submit(PROMPT[7:], None, max_tokens=40, ignore_eos=True),
            ]
            assert all(answer.finished for answer in answers)
            streams.append([answer.events for answer in answers])
            tokens = engine.metrics.registry.get_sample_value("polyhead_completion_tokens_total")
            assert tokens == 12 + sum(answer.finished.usage.completion_tokens for answer in answers)
    assert streams[0] == streams[1]


def test_what_is_booked_is_handed_out_before_the_engine_stops(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "returns_early", True)
    with local_engine(**folders) as engine:
        settle = engine.engine._settle

        def last(*arguments: Any) -> Any:
            engine.engine._stopping = True
            return settle(*arguments)

        monkeypatch.setattr(engine.engine, "_settle", last)
        answer = engine.submit(PROMPT, "a", max_tokens=1)
        assert len(answer.tokens()) == 1


def test_the_context_bounds_prompt_and_output(engine: LocalEngine) -> None:
    long = [5 + i % 200 for i in range(250)]
    assert len(engine.submit(long, None, max_tokens=100, ignore_eos=True).tokens()) == 6
    with pytest.raises(PromptTooLong, match=r"256 tokens.*256"):
        engine.submit([5] * 256)
    assert len(engine.submit([5] * 256, score_prompt=True).prompt_logprobs) == 255


def test_a_full_queue_says_when_to_come_back(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.engine._runner.forward
    monkeypatch.setattr(engine.engine._runner, "forward", lambda batch: (time.sleep(0.05), forward(batch))[1])
    answers = []
    refused: QueueFull | None = None
    while refused is None and len(answers) < 200:
        try:
            answers.append(engine.submit(PROMPT, None, max_tokens=2))
        except QueueFull as error:
            refused = error
    assert refused is not None
    assert refused.retry_after_s
    assert all(answer.finished for answer in answers)


def test_draining_refuses_new_requests_and_fails_late_ones(folders: dict[str, Path]) -> None:
    with local_engine(**folders) as engine:
        running = engine.submit(PROMPT, None, max_tokens=400, ignore_eos=True)
        assert not engine.engine.drain(0.01)
        assert isinstance(running.events[-1], FailedEvent)
        with pytest.raises(Draining):
            assert running.finished
        with pytest.raises(Draining):
            engine.submit(PROMPT)


def test_a_closed_engine_lets_its_memory_go(folders: dict[str, Path]) -> None:
    """Whoever makes another one on the same device needs it."""
    with local_engine(**folders) as engine:
        engine.submit(PROMPT, max_tokens=2).tokens()
        held = [weakref.ref(engine.backbone.model), weakref.ref(engine.engine._runner.kv)]
    del engine
    gc.collect()
    assert [one() for one in held] == [None, None]
