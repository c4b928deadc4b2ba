"""`[[adapters]]` in a configuration: what becomes of it, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import LoraSettings, RunConfig, TogetherConfig, load_config, load_run

FILE = """
output = "out"
[backbone]
device = "cuda"
[adapter]
rank = 4
[data]
held_out = ["held_out.jsonl"]
[training]
max_steps = 9
learning_rate = 1e-4
[[adapters]]
name = "one"
title = "The first"
data = { train = ["one.jsonl"] }
[[adapters]]
name = "v1.2"
adapter = { alpha = 99, use_rslora = true }
data = { train = ["two.jsonl"], held_out = ["else.jsonl"] }
training = { epochs = 2, seed = 3 }
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TogetherConfig:
    (tmp_path / "run.toml").write_text(text)
    config = load_run(tmp_path / "run.toml", overrides)
    assert isinstance(config, TogetherConfig)
    return config


def test_each_is_a_whole_run_over_what_is_shared(tmp_path: Path) -> None:
    config = load(tmp_path, FILE, "adapters.v1.2.training.batch_size=2", "adapter.dropout=0.5")
    one, two = config.runs["one"], config.runs["v1.2"]
    assert (one.output, two.output) == (Path("out/one"), Path("out/v1.2"))
    assert (one.title, two.title) == ("The first", "")
    assert one.adapter == LoraSettings(rank=4, dropout=0.5)
    assert two.adapter == LoraSettings(rank=4, alpha=99, use_rslora=True, dropout=0.5)
    assert (one.training.max_steps, one.training.epochs) == (9, None)
    assert (two.training.max_steps, two.training.epochs) == (None, 2)
    assert (two.training.seed, two.training.batch_size, two.training.learning_rate) == (3, 2, 1e-4)
    assert (one.training.seed, one.training.batch_size) == (0, 16)
    assert (one.data.held_out, two.data.held_out) == (["held_out.jsonl"], ["else.jsonl"])
    assert one.backbone == two.backbone == config.shared.backbone
    assert config.shared.backbone.device == "cuda"


def test_a_file_without_adapters_is_a_run(tmp_path: Path) -> None:
    text = FILE.partition("[[adapters]]")[0].replace("[data]", '[data]\ntrain = ["train.jsonl"]')
    (tmp_path / "run.toml").write_text(text)
    assert isinstance(load_run(tmp_path / "run.toml"), RunConfig)
    (tmp_path / "run.toml").write_text(FILE)
    with pytest.raises(ConfigError, match="several adapters"):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("given", "changed", "said"),
    [
        ('name = "v1.2"', 'name = "one"', "two [[adapters]] have the name 'one'"),
        ('name = "v1.2"', "", "[[adapters]] number 2: name = None: expected the name"),
        ('name = "v1.2"', 'name = "../up"', "has no slash"),
        ('data = { train = ["one.jsonl"] }', "", "[[adapters]] one: the setting data.train is missing"),
        ('data = { train = ["one.jsonl"] }', "data = 3", "[[adapters]] one: data = 3"),
        ('output = "out"', "", "output is missing: the folder"),
        ('title = "The first"', 'titel = "x"', "[[adapters]] one: unknown setting titel; did you mean title?"),
        (
            "alpha = 99",
            "aplha = 99",
            "v1.2: unknown setting adapter.aplha of the method lora; did you mean adapter.alpha",
        ),
        ("seed = 3", 'seed = "x"', "[[adapters]] v1.2: training.seed = 'x'"),
        ("seed = 3", "num_threads = 3", "v1.2: training.num_threads concerns passes that all adapters share"),
        ("seed = 3", "neftune_alpha = 5", "v1.2: not trained together with others: training.neftune_alpha"),
        ("alpha = 99, use_rslora = true", "use_dora = true", "adapter.use_dora = true, whose magnitudes"),
        ("alpha = 99", 'bias = "all"', "adapter.bias = all, which trains biases"),
        ("alpha = 99", 'init = "pissa"', "adapter.init = pissa, which takes its part out of the backbone"),
        ("alpha = 99, use_rslora = true", 'method = "dora"', "v1.2: adapter.method = dora: it is a form of lora"),
        ("[backbone]", 'task = "preference"\n[backbone]', "one: not trained together with others: task = preference"),
    ],
)
def test_refusals_name_the_adapter_and_the_setting(tmp_path: Path, given: str, changed: str, said: str) -> None:
    assert given in FILE
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, FILE.replace(given, changed))
    assert said in caught.value.message


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning", "bottleneck", "full", "ln_tuning"])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str) -> None:
    text = FILE.replace("rank = 4", "").replace("alpha = 99, use_rslora = true", f'method = "{method}"')
    with pytest.raises(ConfigError, match=rf"v1\.2: not trained together with others: adapter.method = {method}"):
        load(tmp_path, text)


def test_an_override_for_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such adapter; there are one, v1\.2"):
        load(tmp_path, FILE, "adapters.three.title=x")


def test_checkpointed_layers_and_dropout_are_refused(tmp_path: Path) -> None:
    overrides = ("training.activation_checkpointing=all", "adapters.one.adapter.dropout=0.1")
    with pytest.raises(ConfigError, match=r"one: .*activation_checkpointing with adapter.dropout"):
        load(tmp_path, FILE, *overrides)
    assert load(tmp_path, FILE, overrides[0]).shared.training.activation_checkpointing == "all"
