"""Adapters trained together and killed at any moment: continued, each is as if nothing had happened."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from together_runs import file as file
from together_runs import given as given
from together_runs import loaded, train
from together_runs import whole as whole

from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.errors import CheckpointExists, ResumeRefused
from polyhead_trainer.together.run import TogetherResult, run_together

SAVING = ("checkpoint.every_steps=2", "checkpoint.asynchronous=false")


class Killed(BaseException):
    """What no part of the trainer catches."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the run in the optimizer's step of that number, counted over all adapters."""
    usual = torch.optim.AdamW.step
    count = 0

    def set_at(number: int) -> None:
        nonlocal count
        count = 0

        def step(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return usual(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", step if number else usual)

    return set_at


def losses(result: TogetherResult) -> dict[str, list[tuple[float, float]]]:
    return {name: [(step.loss, step.grad_norm) for step in one.record.curve] for name, one in result.published.items()}


def test_a_killed_run_continues_bit_for_bit(
    file: Path, tmp_path: Path, whole: TogetherResult, kill_at: Callable[[int], None]
) -> None:
    """Killed before a checkpoint, with both at work, in the last step of one, and after it."""
    # From the third on, two more steps: torch takes one of each optimizer to give it states to load into.
    for number, rounds in ((2, []), (6, [2]), (8, [2, 4]), (6, [4, 6])):
        kill_at(number)
        with pytest.raises(Killed):
            train(file, *SAVING, resume=True)
        assert {path.suffix for path in (tmp_path / "adapters").iterdir()} == {".tensorboard"}, "one was published"
        assert CheckpointDirectory(tmp_path / "adapters").steps() == rounds
    kill_at(0)
    continued = train(file, *SAVING, resume=True)
    assert losses(continued) == losses(whole)
    for name, one in continued.published.items():
        assert one.content_hash == whole.published[name].content_hash
        assert one.record.before == whole.published[name].record.before
    assert not CheckpointDirectory(tmp_path / "adapters").path.exists()


@dataclass
class Counter:
    """An energy counter that advances by 7 J whenever it is read."""

    name: str = "GPU test"
    wraps_at_joules: float | None = None
    joules: float = 0.0

    def read_joules(self) -> float:
        self.joules += 7
        return self.joules


def test_energy_is_shared_out_by_tokens_and_survives_a_kill(
    file: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Callable[[int], None]
) -> None:
    monkeypatch.setattr("polyhead_trainer.together.run.readable_counters", lambda _: [Counter()])
    kill_at(6)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    result = train(file, *SAVING, resume=True)
    records = {name: one.record for name, one in result.published.items()}
    tokens = {name: sum(step.num_tokens for step in record.curve) for name, record in records.items()}
    spent = {name: record.energy_joules["GPU test"] for name, record in records.items()}
    assert sum(spent.values()) == pytest.approx(7 * 7), "seven rounds, those after the checkpoint again"
    assert spent["sizes"] / spent["colours"] == pytest.approx(tokens["sizes"] / tokens["colours"])
    assert (
        "energy of the whole device while training, its part by tokens"
        in (records["sizes"].config.output / "report.html").read_text()
    )


def test_settings_that_change_rounding_alone_may_change_and_are_told_of(
    file: Path, kill_at: Callable[[int], None], whole: TogetherResult
) -> None:
    kill_at(8)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    console = Console(record=True, width=300, file=io.StringIO())
    run_together(loaded(file, *SAVING, "adapters.sizes.training.micro_batch_size=2"), console, resume=True)
    assert "sizes: training.micro_batch_size was null, is 2: from here on" in console.export_text()


def test_an_adapter_that_had_stopped_early_stays_so(file: Path, tmp_path: Path, kill_at: Callable[[int], None]) -> None:
    settings = ("evaluate_every=1", "early_stopping_patience=1", "keep=best", "learning_rate=3")
    overrides = [f"adapters.sizes.training.{setting}" for setting in settings]
    undisturbed = train(file, *overrides, f'output="{tmp_path}/undisturbed"')
    num_steps = {name: len(one.record.curve) for name, one in undisturbed.published.items()}
    assert num_steps["sizes"] < 5
    assert num_steps["colours"] == 7
    kill_at(sum(num_steps.values()))
    with pytest.raises(Killed):
        train(file, *overrides, "checkpoint.every_steps=1", "checkpoint.asynchronous=false")
    kill_at(0)
    result = train(file, *overrides, "checkpoint.every_steps=1", resume=True)
    assert losses(result) == losses(undisturbed)


def test_streamed_data_continue_where_they_stood(file: Path, tmp_path: Path, kill_at: Callable[[int], None]) -> None:
    streamed = ("adapters.colours.data.streaming=true", "adapters.colours.data.shuffle_buffer=8")
    undisturbed = train(file, *streamed, f'output="{tmp_path}/undisturbed"')
    kill_at(10)
    with pytest.raises(Killed):
        train(file, *streamed, *SAVING)
    kill_at(0)
    continued = train(file, *streamed, *SAVING, resume=True)
    assert losses(continued) == losses(undisturbed)
    assert continued.published["colours"].record.data.num_train_tokens is None


def test_killed_between_two_publications(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead_trainer.together import run as module

    usual, published = module.publish, []

    def die_at_the_second(*args: Any, **options: Any) -> str:
        if published:
            raise Killed
        published.append(usual(*args, **options))
        return published[0]

    monkeypatch.setattr(module, "publish", die_at_the_second)
    with pytest.raises(Killed):
        train(file)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["colours", "sizes.tensorboard"]
    monkeypatch.setattr(module, "publish", usual)
    result = train(file, resume=True)
    assert result.published["colours"].content_hash == published[0]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["colours", "sizes"]


def test_a_diverged_adapter_stays_so_when_the_run_continues(file: Path, kill_at: Callable[[int], None]) -> None:
    override = "adapters.sizes.training.learning_rate=1e30"
    kill_at(8)
    with pytest.raises(Killed):
        train(file, override, *SAVING)
    kill_at(0)
    result = train(file, override, *SAVING, resume=True)
    assert "sizes.diverged.json" in result.failures["sizes"].message
    assert len(result.published["colours"].record.curve) == 7


def test_an_unfinished_run_is_neither_ignored_nor_taken_for_another(file: Path, kill_at: Callable[[int], None]) -> None:
    kill_at(6)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    with pytest.raises(CheckpointExists, match="--resume"):
        train(file)
    with pytest.raises(ResumeRefused, match=r"adapter sizes, belongs to another run: training.seed was 5, is 6"):
        train(file, "adapters.sizes.training.seed=6", resume=True)
    text = file.read_text()
    file.write_text(text.replace('name = "sizes"', 'name = "widths"'))
    with pytest.raises(ResumeRefused, match=r"its \[\[adapters\]\] were colours, sizes, and are colours, widths"):
        train(file, resume=True)
