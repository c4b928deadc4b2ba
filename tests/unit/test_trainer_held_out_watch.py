"""Measuring while training: it disturbs nothing, stops early, and gives back the best weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from test_trainer_loop import EXAMPLES, OBJECTIVE, PAD, Keep, tiny_lora
from torch import nn

import tiny
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import EvaluateSection, TrainingSection, load_config
from polyhead_trainer.evaluate import Evaluator, prepare
from polyhead_trainer.held_out_watch import HeldOutWatch
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.trained_state import copy_state


def section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate({"max_steps": 8, "batch_size": 3, **values})


def evaluator() -> Evaluator:
    return prepare(EvaluateSection(generate_examples=0), EXAMPLES[:3], tiny.tokenizer(), PAD)


@dataclass
class Scripted:
    """Held-out losses as a test wants them; keeps a copy of the weights that each was asked for."""

    losses: Iterator[float]
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def held_out_loss(self, model: nn.Module) -> float:
        assert not model.training
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return next(self.losses)


def test_measuring_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    results = []
    for every in (0, 2):
        reports: list[StepReport] = []
        settings = section(evaluate_every=every)
        tuned = tiny_lora(tmp_path)
        watch = HeldOutWatch(evaluator(), settings)
        loop = TrainingLoop(tuned, OBJECTIVE, EXAMPLES, settings)
        loop.run([Keep(reports), watch])
        results.append(([report.loss for report in reports], copy_state(tuned)))
    (losses, plain), (watched_losses, watched) = results
    assert watched_losses == losses
    assert all(torch.equal(watched[name], tensor) for name, tensor in plain.items())
    assert [step for step, _ in watch.losses] == [2, 4, 6, 8]
    assert watch.losses[-1][1] == evaluator().held_out_loss(tuned.model.eval())


def test_the_best_weights_come_back(tmp_path: Path) -> None:
    settings = section(evaluate_every=2, keep="best", learning_rate=1e-2)
    tuned, scripted = tiny_lora(tmp_path), Scripted(iter([3.0, 1.0, 2.0, 1.5]))
    watch = HeldOutWatch(scripted, settings)
    TrainingLoop(tuned, OBJECTIVE, EXAMPLES, settings).run([watch])
    assert (watch.best_step, watch.best_loss) == (4, 1.0)
    assert watch.restore_best(tuned)
    now = copy_state(tuned)
    assert all(torch.equal(now[name], tensor) for name, tensor in scripted.seen[1].items())
    assert not all(torch.equal(now[name], tensor) for name, tensor in scripted.seen[3].items())


def test_keep_last_keeps_the_last(tmp_path: Path) -> None:
    settings = section(evaluate_every=4)
    tuned, scripted = tiny_lora(tmp_path), Scripted(iter([1.0, 2.0]))
    watch = HeldOutWatch(scripted, settings)
    TrainingLoop(tuned, OBJECTIVE, EXAMPLES, settings).run([watch])
    assert not watch.restore_best(tuned)
    now = copy_state(tuned)
    assert all(torch.equal(now[name], tensor) for name, tensor in scripted.seen[1].items())


def test_patience_ends_a_training_that_no_longer_helps(tmp_path: Path) -> None:
    settings = section(max_steps=20, evaluate_every=1, early_stopping_patience=3)
    losses = iter([3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 2.1, 0.1])
    watch = HeldOutWatch(Scripted(losses), settings)
    loop = TrainingLoop(tiny_lora(tmp_path), OBJECTIVE, EXAMPLES, settings)
    loop.run([watch])
    assert loop.step == 7
    assert loop.stopped_because is not None
    assert "1.9000 at step 4, 2.1000 now" in loop.stopped_because


@pytest.mark.parametrize("setting", ["training.early_stopping_patience=2", "training.keep=best"])
def test_what_needs_measurements_says_so(tmp_path: Path, setting: str) -> None:
    (tmp_path / "run.toml").write_text('output = "o"\n[data]\ntrain = []\nheld_out = []\n[training]\nmax_steps = 1\n')
    with pytest.raises(ConfigError, match="need evaluate_every"):
        load_config(tmp_path / "run.toml", [setting])
