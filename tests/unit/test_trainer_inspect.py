"""`trainer inspect` and `trainer recipes`: what they say is what the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from polyhead_core.adapter_directory import content_hash, stamp_backbone
from polyhead_core.errors import AdapterFormatError, ConfigError
from polyhead_trainer.cli import app
from polyhead_trainer.config import TogetherConfig, load_run
from polyhead_trainer.errors import OutputExists
from polyhead_trainer.inspection import inspect_adapter
from polyhead_trainer.recipe_book import copy_recipe, find_recipe, recipes
from tiny import save_adapter, save_backbone


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    backbone = save_backbone("llama", tmp_path / "backbone")
    targets = ["q_proj", "down_proj"]
    return save_adapter(
        backbone, tmp_path / "mine", seed=1, r=4, lora_alpha=6, target_modules=targets, rank_pattern={"down_proj": 7}
    )


def test_the_facts_are_those_of_the_files(adapter: Path) -> None:
    stamp_backbone(adapter, fingerprint="f" * 64, quantization="int8")
    facts = inspect_adapter(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert (facts.peft_type, facts.ranks, facts.alpha) == ("LORA", [4, 7], 6)
    assert facts.target_modules == facts.adapted_modules == ["down_proj", "q_proj"]
    assert facts.num_parameters == 3 * (4 * (64 + 64) + 7 * (96 + 64))
    assert facts.tensor_bytes == 4 * facts.num_parameters
    assert facts.file_bytes == sum(
        (adapter / f"adapter_{n}").stat().st_size for n in ("config.json", "model.safetensors")
    )
    assert {tensor.name: tuple(tensor.shape) for tensor in facts.tensors} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert facts.content_hash == content_hash(adapter)
    assert (facts.backbone_fingerprint, facts.quantization, facts.metrics) == ("f" * 64, "int8", None)


def test_the_command_prints_lines_or_json(adapter: Path) -> None:
    lines = CliRunner().invoke(app, ["inspect", str(adapter)]).stdout
    assert "rank          4, 7" in lines
    assert "fingerprint   not recorded" in lines
    assert "layers.2.self_attn.q_proj.lora_B.weight  float32 [64, 4]" in lines
    facts = json.loads(CliRunner().invoke(app, ["inspect", "--json", str(adapter)]).stdout)
    assert facts["content_hash"] == content_hash(adapter)
    assert len(facts["tensors"]) == 12


def test_hostile_directories_are_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(AdapterFormatError, match="truncated"):
        inspect_adapter(adapter)
    weights.unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="a pickle can run code"):
        inspect_adapter(adapter)


def test_every_recipe_is_listed_and_is_a_configuration(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["recipes", "list"]).stdout
    assert {"tweet_sentiment", "ui_spanish"} <= {recipe.name for recipe in recipes()}
    for recipe in recipes():
        assert f"{recipe.name}\n    {recipe.summary}" in listed
        assert len(recipe.summary) > 10
        assert CliRunner().invoke(app, ["recipes", "show", recipe.name]).stdout == recipe.text
        config = load_run(copy_recipe(recipe.name, tmp_path))
        runs = config.runs.values() if isinstance(config, TogetherConfig) else [config]
        assert all(run.title for run in runs)


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    target = copy_recipe("ui-spanish", tmp_path / "mine.toml")
    assert target.read_text() == find_recipe("ui_spanish.toml").text
    with pytest.raises(OutputExists, match="not touched"):
        copy_recipe("tweet_sentiment", target)
    with pytest.raises(ConfigError, match="did you mean ui_spanish"):
        find_recipe("ui_spanisch")
    with pytest.raises(ConfigError, match="cannot write"):
        copy_recipe("ui_spanish", tmp_path / "nowhere" / "mine.toml")
