"""Runs that fail: what is said, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from test_trainer_run import configuration, run_quietly

import tiny
from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_trainer.errors import OutOfMemory, TrainingDiverged
from polyhead_trainer.estimate import estimate
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.run import run
from polyhead_trainer.trained_state import copy_state


def poisoned(monkeypatch: pytest.MonkeyPatch, letter: str, first_bad_step: int) -> None:
    """From a step on, the backbone's embedding of one letter is not a number."""
    token = tiny.tokenizer()(letter)["input_ids"][0]
    own_step = TrainingLoop._step

    def step(self: TrainingLoop, chosen: object) -> StepReport:
        if self.step + 1 == first_bad_step:
            with torch.no_grad():
                self.tuned.model.get_input_embeddings().weight[token] = torch.nan  # type: ignore[operator]
        return own_step(self, chosen)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingLoop, "_step", step)


def test_a_diverged_run_leaves_its_batch_and_the_last_good_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, " ", first_bad_step=5)
    after: list[dict[str, torch.Tensor]] = []
    own_step = TrainingLoop._step

    def step(self: TrainingLoop, chosen: object) -> StepReport:
        report = own_step(self, chosen)  # type: ignore[arg-type]
        after.append(copy_state(self.tuned))
        return report

    monkeypatch.setattr(TrainingLoop, "_step", step)
    config = configuration(tmp_path, "training.max_steps=8")
    with pytest.raises(TrainingDiverged, match=r"step 5: loss nan.* not a number any more") as caught:
        run_quietly(config)
    message = caught.value.message

    batch_file = config.output.with_name("colours.diverged.json")
    batch = json.loads(batch_file.read_text())
    assert str(batch_file) in message
    assert batch["step"] == 5
    assert [row["token_ids"] for row in batch["examples"]] == [one.token_ids for one in caught.value.examples]
    assert all("train.jsonl:" in row["origin"] for row in batch["examples"])

    assert not config.output.exists()
    kept = config.output.with_name("colours.last-good")
    assert f"the adapter after 3 steps, the last with a finite loss, is in {kept}" in message
    assert read_adapter_directory(kept).quantization == "int8"
    saved = load_file(kept / "adapter_model.safetensors")
    # Step 4's loss was the last finite one, and its weights were those that three steps had made.
    good = {name.replace(".default", ""): tensor for name, tensor in after[2].items()}
    assert good.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in good.items())
    assert not all(torch.equal(after[3][name], tensor) for name, tensor in after[2].items())
    backbone = load_backbone(config.backbone.source, cache_dir=config.backbone.cache_dir)
    PeftModel.from_pretrained(backbone.model, str(kept))


def test_a_run_that_diverges_at_once_says_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, " ", first_bad_step=1)
    config = configuration(tmp_path)
    with pytest.raises(TrainingDiverged, match="no earlier step had shown a finite loss"):
        run_quietly(config)
    names = sorted(path.name for path in config.output.parent.iterdir())
    assert names == ["colours.diverged.json", "colours.tensorboard"]


def test_the_message_names_the_examples_that_are_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, "training.max_steps=4", "training.batch_size=18")
    poisoned(monkeypatch, "k", first_bad_step=3)
    with pytest.raises(TrainingDiverged) as caught:
        run_quietly(config)
    lines = caught.value.message.split("these have no finite loss of their own: ")[1].split(";")[0].split(", ")
    texts = (tmp_path / "train.jsonl").read_text().splitlines()
    blamed = sorted(int(line.rpartition(":")[2]) for line in lines)
    assert blamed == [number for number, text in enumerate(texts, 1) if "k" in text]
    assert config.output.with_name("colours.last-good").is_dir()
    assert "the adapter after 1 steps" in caught.value.message


def test_a_last_step_that_ruins_the_weights_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later step's loss is there to tell: the measurement after training does."""
    after: list[dict[str, torch.Tensor]] = []
    own_step = TrainingLoop._step

    def step(self: TrainingLoop, chosen: object) -> StepReport:
        report = own_step(self, chosen)  # type: ignore[arg-type]
        after.append(copy_state(self.tuned))
        if report.step == report.num_steps:
            for parameter in self._parameters:
                parameter.data.fill_(1e30)
        return report

    monkeypatch.setattr(TrainingLoop, "_step", step)
    config = configuration(tmp_path, "checkpoint.every_steps=1")
    for resume in (False, True):
        with pytest.raises(TrainingDiverged, match="after step 3, the last one, the held-out loss is nan") as caught:
            run(config, Console(quiet=True), resume=resume)
        message, beside = caught.value.message, config.output.parent
        assert not config.output.exists()
        batch = json.loads((beside / "colours.diverged.json").read_text())
        assert batch["step"] == 3
        assert len(batch["examples"]) == 6
        kept = load_file(beside / "colours.last-good" / "adapter_model.safetensors")
        assert all(kept[name.replace(".default", "")].equal(tensor) for name, tensor in after[1].items())
        assert f"step-3, with these weights; {beside}/colours.checkpoints/step-2 is from before" in message
        assert ("the adapter after 2 steps, the last with a finite loss" in message) == (not resume)


def test_a_second_failure_replaces_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, "training.max_steps=4", "training.batch_size=18")
    poisoned(monkeypatch, "o", first_bad_step=3)
    torch.manual_seed(0)
    left = []
    for seed in (0, 1):
        with pytest.raises(TrainingDiverged):
            run_quietly(config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})}))
        left.append((config.output.parent / "colours.last-good" / "adapter_model.safetensors").read_bytes())
    assert left[0] != left[1]
    names = sorted(path.name for path in config.output.parent.iterdir())
    assert names == ["colours.diverged.json", "colours.last-good", "colours.tensorboard"]


def test_a_run_keeps_the_best_weights_and_says_so(tmp_path: Path) -> None:
    how = {"max_steps": 3, "evaluate_every": 1, "keep": "best", "learning_rate": 0.3, "schedule": "constant"}
    config = configuration(tmp_path, *(f"training.{name}={value}" for name, value in how.items()))
    console = Console(record=True, width=200)
    result = run(config, console)
    losses = dict(result.record.held_out_curve)
    best = min(losses, key=lambda step: losses[step])
    assert best < 3, "at this rate the last step is not the best, or this shows nothing"
    assert result.record.after.held_out_loss == losses[best]
    assert f"kept: the weights of step {best}" in console.export_text()


def test_out_of_memory_says_what_is_needed_and_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, "training.batch_size=12", "backbone.quantization=none")

    def step(self: TrainingLoop, chosen: object) -> StepReport:
        torch.empty(1 << 55)
        raise AssertionError("there was that much memory")

    monkeypatch.setattr(TrainingLoop, "_step", step)
    with pytest.raises(OutOfMemory) as caught:
        run_quietly(config)
    message = caught.value.message
    assert "out of memory on cpu: " in message
    needed = estimate(config)
    assert f"activations {needed.activations / (1 << 20):,.0f} MiB" in message
    assert f"peak {needed.peak / (1 << 20):,.0f} MiB" in message
    assert "settings that need less: training.micro_batch_size = 3 (" in message
    smaller = estimate(configuration(tmp_path, "training.batch_size=12", "training.micro_batch_size=3"))
    assert smaller.peak < needed.peak
    assert not config.output.exists()


def test_a_run_out_of_memory_goes_on_with_what_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["training.batch_size=12", "backbone.quantization=none", "checkpoint.every_steps=1"]
    overrides.append("checkpoint.asynchronous=false")
    config = configuration(tmp_path, *overrides)
    own_step = TrainingLoop._step

    def step(self: TrainingLoop, chosen: object) -> StepReport:
        if self.step == 2:
            raise MemoryError("no more")
        return own_step(self, chosen)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", step)
        with pytest.raises(OutOfMemory) as caught:
            run_quietly(config)
    message = caught.value.message
    assert "where it ran out while measuring: evaluate.batch_size = 8" in message
    assert "with these --resume continues " in message
    assert "step-2, but without backbone.quantization, which would make another run of it" in message
    advised = (
        message.partition("settings that need less: ")[2].partition("; where")[0].split("; ")[1].partition(" (")[0]
    )
    assert advised == "training.micro_batch_size = 3 and training.activation_checkpointing = all"
    again = configuration(tmp_path, *overrides, *advised.replace(" = ", "=").split(" and "), "evaluate.batch_size=8")
    result = run(again, Console(quiet=True), resume=True)
    assert len(result.record.curve) == 3


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: TrainingLoop, chosen: object) -> StepReport:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(TrainingLoop, "_step", step)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        run_quietly(configuration(tmp_path))
