"""Runs on 2 processes of this CPU (gloo) that differ from plain LoRA in what they train, keep or save, or in how they
end: as one process does it."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from polyhead_trainer.config import load_config
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.parallel.launch import launch
from polyhead_trainer.run import run
from trainer_processes import COLOURS, finish, write_run

WEIGHTS = {"full": "model.safetensors"}
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "polyhead_metrics.json").read_text())
    return found


def check_ranks_do_as_one(file: Path, *settings: str) -> dict[str, Any]:
    """The record of two ranks' run, compared with that of one process."""
    assert finish(file, *settings) == 0
    alone, output = file.parent / "adapters/colours", file.parent / "adapters/ranks"
    config = load_config(file, [*settings, f"output={output}"])
    launch(config, 2, overwrite=False, resume=False)

    one, several = record(alone), record(output)
    losses = [
        [found["before"]["held_out_loss"], *(step["loss"] for step in found["curve"]), found["after"]["held_out_loss"]]
        for found in (one, several)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert [step for step, _ in several["held_out_curve"]] == [step for step, _ in one["held_out_curve"]]
    name = WEIGHTS.get(config.adapter.method, ADAPTER_WEIGHTS)
    mine, theirs = (load_file(folder / name) for folder in (output, alone))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name
    return several


def test_packed_weights_outside_of_layers_are_trained_and_the_best_of_them_kept(tmp_path: Path) -> None:
    """The embedding is the root's: packing and measurements come before a backward pass, checkpoints right after."""
    file = write_run(tmp_path, method="full", quantization="none", steps=4)
    training = {"packing": True, "evaluate_every": 1, "keep": "best", "optimizer": "sgd", "schedule": "constant"}
    settings = [f"training.{name}={json.dumps(value)}" for name, value in training.items()]
    found = check_ranks_do_as_one(file, *settings, "training.learning_rate=1")
    losses = dict(found["held_out_curve"])
    best = min(losses, key=lambda step: losses[step])
    assert best < 4, "the last step is the best one, or this shows nothing"
    assert found["after"]["held_out_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_pissa_keeps_and_subtracts_its_initial_adapter_in_shards(tmp_path: Path) -> None:
    file = write_run(tmp_path, quantization="none", steps=2, dropout=0.0)
    check_ranks_do_as_one(file, "adapter.init=pissa", 'adapter.target_modules=["q_proj"]')


def test_the_last_layers_are_published_with_those_before_them(tmp_path: Path) -> None:
    check_ranks_do_as_one(write_run(tmp_path, method="full", quantization="none", steps=2), "adapter.last_layers=1")


def test_norms_and_heads_outside_of_layers_are_trained_too(tmp_path: Path) -> None:
    sgd = ("training.optimizer=sgd", "training.learning_rate=0.05")
    check_ranks_do_as_one(write_run(tmp_path / "norms", method="ln_tuning", quantization="none", steps=2), *sgd)
    head = 'adapter={rank = 4, target_modules = ["lm_head", "v_proj"]}'
    check_ranks_do_as_one(write_run(tmp_path / "head", quantization="none", steps=2), head, *sgd)


@pytest.mark.parametrize("method", ["head", "lora"])
def test_a_classifier(tmp_path: Path, method: str) -> None:
    texts = [{"text": f"{number}. {thing}", "label": label} for number in range(3) for thing, label in COLOURS.items()]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts[6:])))
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, texts[:6])))
    data = f'data={{train = ["{tmp_path}/texts.jsonl"], held_out = ["{tmp_path}/more.jsonl"]}}'
    file = write_run(tmp_path, method=method, quantization="none", steps=2, dropout=0.0)
    added_layers = ["adapter.hidden=[24]"] if method == "head" else []
    check_ranks_do_as_one(file, "task=classification", *added_layers, data)


def test_preferences_with_an_adapter_outside_of_layers(tmp_path: Path) -> None:
    """Each step's reference is the model without it."""
    pairs = [
        {"prompt": f"Colour of {thing}, {number}:", "chosen": f" {colour}", "rejected": " grey"}
        for number in range(3)
        for thing, colour in COLOURS.items()
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs[6:])))
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, pairs[:6])))
    data = f'data={{train = ["{tmp_path}/pairs.jsonl"], held_out = ["{tmp_path}/more.jsonl"]}}'
    file = write_run(tmp_path, quantization="none", steps=3, dropout=0.0)
    adapter = 'adapter={rank = 4, dropout = 0.0, target_modules = ["lm_head", "v_proj"]}'
    sgd = ("training.optimizer=sgd", "training.learning_rate=0.05", "training.micro_batch_size=2")
    check_ranks_do_as_one(file, "task=preference", data, adapter, *sgd)


def test_ranks_that_diverge_end_soon_and_leave_what_one_process_does(tmp_path: Path) -> None:
    file = write_run(tmp_path, method="full", quantization="none")
    checkpoints = ["checkpoint.every_steps=1"]
    told, batches = [], []
    for name, train in (
        ("one", partial(run, console=Console(quiet=True))),
        ("ranks", partial(launch, nproc=2, overwrite=False, resume=False)),
    ):
        output = tmp_path / name / "colours"
        settings = [f"output={output}", "training.learning_rate=1e30", "training.warmup=0", *checkpoints]
        started = time.monotonic()
        with pytest.raises(TrainingDiverged, match="step 2: loss") as error:
            train(load_config(file, settings))
        assert time.monotonic() - started < 120, "hung, or nearly"
        told.append(re.sub(r"loss [\d.]+", "loss L", error.value.message.replace(str(output), "OUTPUT")))
        batches.append(json.loads(output.with_name("colours.diverged.json").read_text()))
        left = sorted(path.name for path in output.parent.iterdir())
        assert left == ["colours.checkpoints", "colours.diverged.json", "colours.tensorboard"]
        assert [path.name for path in output.parent.glob("colours.checkpoints/*")] == ["step-1"]
    assert told[1] == told[0]
    assert "the step's token ids are in OUTPUT.diverged.json" in told[1]
    assert [row.pop("rank") for row in batches[1]["examples"]] == [0, 1, 0, 1, 0, 1, 0]
    assert {row.pop("rank") for row in batches[0]["examples"]} == {0}
    assert batches[1] == batches[0]
