"""Full and partial fine-tuning: what moves, what does not, and an output that transformers loads as equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_classification import configuration as classification
from test_trainer_run import configuration, run_quietly
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.config import FullSettings
from polyhead_trainer.methods import trained_parameters
from polyhead_trainer.reevaluate import measure, read_subject
from tiny import save_backbone

FLOAT = ("backbone.quantization=none", "backbone.dtype=float32")


def moved(loader: Any, before: Path, after: Path) -> set[str]:
    old, new = (loader.from_pretrained(directory).state_dict() for directory in (before, after))
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("last", [None, 1, 2])
def test_weights_move_where_they_should_and_the_output_is_a_model(tmp_path: Path, last: int | None) -> None:
    adapter = '{method = "full"}' if last is None else f'{{method = "full", last_layers = {last}}}'
    config = configuration(tmp_path, f"adapter={adapter}", *FLOAT)
    result = run_quietly(config)
    assert result.record.after.held_out_loss < result.record.before.held_out_loss
    changed = moved(AutoModelForCausalLM, tmp_path / "backbone", config.output)
    every = {*AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").state_dict()}
    opened = tuple(f"model.layers.{number}." for number in range(3 - (last or 3), 3))
    partly = {name for name in every if name.startswith((*opened, "model.norm."))}
    assert changed == (every if last is None else partly)
    assert result.record.trainable.num_trainable == sum(
        parameter.numel()
        for name, parameter in AutoModelForCausalLM.from_pretrained(config.output).named_parameters()
        if name in changed
    )
    again = measure(read_subject(config.output, []))
    assert (again.before, again.after) == (result.record.before, result.record.after)
    assert again.content_hash == result.content_hash
    assert "whole model" in (config.output / "README.md").read_text()


def test_a_classifiers_scores_are_trained_with_its_last_layers(tmp_path: Path) -> None:
    config = classification(tmp_path, {"method": "full", "last_layers": 1}, *FLOAT)
    result = run_quietly(config)
    again = measure(read_subject(config.output, []))
    assert again.after == result.record.after
    assert result.record.curve[-1].loss < 0.8 * result.record.curve[0].loss
    reloaded = AutoModelForSequenceClassification.from_pretrained(config.output)
    assert reloaded.config.id2label == {0: "good", 1: "bad", 2: "flat"}
    changed = moved(AutoModelForSequenceClassification, tmp_path / "backbone", config.output)
    assert "score.weight" in changed
    assert not {name for name in changed if not name.startswith(("model.layers.2.", "model.norm", "score"))}


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "gemma"])
def test_last_layers_of_other_architectures(tmp_path: Path, kind: str) -> None:
    backbone = load_backbone(str(save_backbone(kind, tmp_path)), quantization="none", cache_dir=tmp_path / "cache")
    names = {*trained_parameters(methods.tune(backbone, FullSettings(method="full", last_layers=1), 0).model)}
    assert {name for name in names if ".layers.2." in name} == {
        name for name, _ in backbone.model.named_parameters() if ".layers.2." in name
    }
    rest = {name for name in names if ".layers." not in name}
    assert rest
    assert all("norm" in name for name in rest)


@pytest.mark.parametrize("override", ["backbone.quantization=int8", "backbone.dtype=bfloat16"])
def test_weights_that_cannot_be_trained_are_refused(tmp_path: Path, override: str) -> None:
    config = configuration(tmp_path, 'adapter={method = "full"}', *FLOAT, override)
    with pytest.raises(ConfigError, match=r"set backbone\.quantization = none and backbone\.dtype = float32"):
        run_quietly(config)


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path, 'adapter={method = "full", last_layers = 4}', *FLOAT)
    with pytest.raises(ConfigError, match="last_layers = 4: the backbone has 3 layers"):
        run_quietly(config)
