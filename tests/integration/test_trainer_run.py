"""`trainer run` from a TOML file to an adapter that stock peft loads, on a tiny backbone and on the default one."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from polyhead_core.adapter_directory import content_hash, read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones
from polyhead_trainer.config import RunConfig, load_config
from polyhead_trainer.data import load_examples
from polyhead_trainer.errors import DataError, OutputExists
from polyhead_trainer.evaluate import prepare
from polyhead_trainer.record import METRICS_FILE, read_record
from polyhead_trainer.run import RunResult, run
from tiny import save_backbone

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "lemon": "yellow"}


def write_data(folder: Path) -> None:
    lines = [
        json.dumps({"prompt": f"Colour of {thing}, {number}:", "completion": f" {colour}"})
        for number in range(4)
        for thing, colour in COLOURS.items()
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[6:]))
    (folder / "held_out.jsonl").write_text("\n".join(lines[:6]))
    (folder / "general.txt").write_text("An adapter is small and its backbone is large. " * 20)


def configuration(tmp_path: Path, *overrides: str, backbone: str | None = None) -> RunConfig:
    if not (tmp_path / "train.jsonl").exists():
        write_data(tmp_path)
    source = backbone or str(tiny(tmp_path))
    (tmp_path / "run.toml").write_text(f"""
output = "{tmp_path}/adapters/colours"
title = "Colours of things"
[backbone]
source = "{source}"
{"" if backbone else f'cache_dir = "{tmp_path}/cache"'}
[adapter]
rank = 4
[data]
train = ["{tmp_path}/train.jsonl"]
held_out = ["{tmp_path}/held_out.jsonl"]
license = "none needed: six common facts"
[training]
max_steps = 3
batch_size = 6
learning_rate = 2e-3
[evaluate]
generate_examples = 3
max_new_tokens = 4
general_text = "{tmp_path}/general.txt"
general_tokens = 64
""")
    return load_config(tmp_path / "run.toml", overrides)


def tiny(tmp_path: Path) -> Path:
    directory = tmp_path / "backbone"
    return directory if directory.exists() else save_backbone("llama", directory)


def run_quietly(config: RunConfig, *, overwrite: bool = False) -> RunResult:
    return run(config, Console(quiet=True), overwrite=overwrite)


def check_reloaded(config: RunConfig, result: RunResult) -> None:
    """Stock peft on a fresh backbone gives the very losses and answers that the run measured."""
    cache = config.backbone.cache_dir
    backbone = load_backbone(config.backbone.source, quantization=config.backbone.quantization, cache_dir=cache)
    held_out = load_examples(config.data.held_out, backbone.tokenizer, config.data.max_length)
    evaluator = prepare(config.evaluate, held_out.examples, backbone.tokenizer, backbone.tokenizer.pad_token_id)
    before = evaluator.measure(backbone.model)
    after = evaluator.measure(PeftModel.from_pretrained(backbone.model, str(config.output)))
    assert before == result.record.before
    assert after == result.record.after
    assert after.held_out_loss < before.held_out_loss


def test_a_run_leaves_an_adapter_that_stock_peft_loads(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    result = run_quietly(config)
    check_reloaded(config, result)
    directory = read_adapter_directory(config.output)
    assert directory.content_hash == result.content_hash
    assert directory.backbone_fingerprint == result.record.backbone.fingerprint
    assert directory.quantization == "int8"
    assert sorted(file.name for file in config.output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        METRICS_FILE,
        "report.html",
        "tensorboard",
    ]
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["colours"]


def test_the_default_backbone_in_int8_learns_in_three_steps(tmp_path: Path) -> None:
    config = configuration(tmp_path, 'adapter.target_modules=["q_proj", "v_proj"]', backbone="default")
    result = run_quietly(config)
    check_reloaded(config, result)
    settings = json.loads((config.output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result.record.trainable.num_trainable == 30 * 4 * (576 + 576 + 576 + 192)
    assert result.record.trainable.num_total == 134_515_008 + result.record.trainable.num_trainable


@pytest.mark.parametrize("quantization", ["none", "llm.int8"])
def test_other_backbones(tmp_path: Path, quantization: str) -> None:
    config = configuration(tmp_path, f"backbone.quantization={quantization}")
    result = run_quietly(config)
    assert result.record.after.held_out_loss < result.record.before.held_out_loss
    assert read_adapter_directory(config.output).quantization == quantization


def test_nf4_is_refused_on_the_cpu_and_made_of_double_quantised_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it learns on a GPU is in tests/gpu."""
    config = configuration(tmp_path, "backbone.quantization=nf4")
    with pytest.raises(ConfigError, match=r"nf4 on the CPU: .* set backbone.device = cuda"):
        run_quietly(config)
    monkeypatch.setattr(backbones, "check_loadable", lambda *_: None)
    model = backbones.load(config.backbone).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 3 * 7
    for layer in layers:
        assert layer.weight.quant_state is not None
        assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
        assert layer.compute_dtype == torch.float32


def test_rslora_patterns_bias_head_and_embedding(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        "adapter.use_rslora=true",
        'adapter.target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]',
        "adapter.rank_pattern={q_proj = 2}",
        "adapter.alpha_pattern={q_proj = 3}",
        "adapter.dropout=0.1",
    )
    check_reloaded(config, run_quietly(config))
    tensors = load_file(config.output / "adapter_model.safetensors")
    assert not [name for name in tensors if "lora_" not in name], "the embedding itself must not be saved"
    assert {tensor.shape[0] for name, tensor in tensors.items() if "q_proj.lora_A" in name} == {2}


def test_earlier_tasks_are_read_in_every_form_and_with_columns_of_their_own(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    with (tmp_path / "earlier.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["asked", "told"], *([row["prompt"], row["completion"]] for row in rows)])
    config = configuration(
        tmp_path,
        f'evaluate.earlier=["{tmp_path}/earlier.csv"]',
        'evaluate.earlier_columns={prompt = "asked", completion = "told"}',
    )
    result = run_quietly(config)
    for measured in (result.record.before, result.record.after):
        assert measured.earlier_loss == pytest.approx(measured.held_out_loss, rel=1e-6)
    with pytest.raises(ConfigError, match="expected a column for every field of one form"):
        configuration(tmp_path, 'evaluate.earlier_columns={prompt = "asked"}')


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        config = configuration(tmp_path, f"output={tmp_path}/{name}", f"training.seed={seed}", "adapter.dropout=0.1")
        run_quietly(config)
        hashes.append(content_hash(config.output))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_metrics_file_says_what_was_done(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    result = run_quietly(config)
    record = read_record(config.output)
    assert record is not None
    assert record["config"]["adapter"]["rank"] == 4
    assert record["data"]["num_train"] == 18
    assert len(record["data"]["sha256"]) == 64
    assert [step["step"] for step in record["curve"]] == [1, 2, 3]
    assert record["backbone"]["fingerprint"] == result.record.backbone.fingerprint
    assert torch.__version__.startswith(record["versions"]["torch"])
    for moment in ("before", "after"):
        assert record[moment]["general_perplexity"] > 1
        assert len(record[moment]["answers"]) == 3
    card = (config.output / "README.md").read_text()
    assert "# Colours of things" in card
    assert "none needed: six common facts" in card


def test_a_finished_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    first = run_quietly(config)
    with pytest.raises(OutputExists, match="--overwrite"):
        run_quietly(config)
    other = configuration(tmp_path, "training.seed=1")
    assert run_quietly(other, overwrite=True).content_hash != first.content_hash
    assert content_hash(config.output) != first.content_hash


def test_a_directory_that_is_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.output.mkdir(parents=True)
    (config.output / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is no run's output"):
        run_quietly(config, overwrite=True)
    assert (config.output / "thesis.tex").read_text() == "mine"


def test_a_run_that_fails_leaves_nothing(tmp_path: Path) -> None:
    config = configuration(tmp_path, "training.learning_rate=1e30")
    with pytest.raises(Exception, match="not a number any more"):
        run_quietly(config)
    assert not config.output.exists()


def test_choices_must_be_distinct_and_cover_the_held_out_answers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same token"):
        run_quietly(configuration(tmp_path, 'evaluate.choices=[" green", " grey"]'))
    with pytest.raises(DataError, match=r"held_out\.jsonl:1: completion ' green' is not in"):
        run_quietly(configuration(tmp_path, 'evaluate.choices=["red"]'))


def test_the_command_prints_one_line_for_a_users_mistake(tmp_path: Path) -> None:
    configuration(tmp_path)
    command = [sys.executable, "-m", "polyhead_trainer", "run", str(tmp_path / "run.toml"), "--set", "adapter.rnak=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "unknown setting adapter.rnak of the method lora; did you mean adapter.rank?" in result.stderr


def test_the_command_names_the_extra_that_a_missing_package_needs(tmp_path: Path) -> None:
    configuration(tmp_path)
    blocked = "import sys; sys.modules['peft'] = None; from polyhead_trainer.cli import main; main()"
    command = [sys.executable, "-c", blocked, "run", str(tmp_path / "run.toml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'polyhead[trainer]'" in result.stderr
