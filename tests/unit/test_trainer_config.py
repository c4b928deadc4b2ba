"""The trainer's configuration: what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import known_entry_settings, known_settings, load_config, load_run

MINIMAL = """
output = "out"
[data]
train = ["train.jsonl"]
held_out = ["held_out.jsonl"]
[training]
epochs = 1
"""
RECIPES = Path(__file__).parents[2] / "trainer" / "polyhead_trainer" / "recipes"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_take_toml_values_and_bare_words(file: Path) -> None:
    overrides = [
        "training.learning_rate=2e-4",
        'adapter.target_modules=["q_proj"]',
        "title=two words",
        "adapter.rank=4",
    ]
    config = load_config(file, overrides)
    assert config.training.learning_rate == 2e-4
    assert config.adapter.target_modules == ["q_proj"]
    assert config.title == "two words"
    assert config.adapter.rank == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learnin_rate=1", "unknown setting training.learnin_rate; did you mean training.learning_rate?"),
        ("rank=1", "unknown setting rank; did you mean adapter.rank?"),
        ("adapter.rank=0", "adapter.rank = 0: Input should be greater than or equal to 1"),
        ("adapter.rank=eight", "adapter.rank = 'eight': Input should be a valid integer"),
        ("adapter.layers=[]", "would mean all layers"),
        ("adapter={init = 'pissa', bias = 'all'}", "init = pissa goes with bias = none alone"),
        ("adapter={init = 'olora', use_rslora = true, alpha_pattern = {q_proj = 4}}", "goes with neither rank_pattern"),
        ("adapter={bias = 'all', warm_start = 'x'}", "bias = all goes without warm_start"),
        ("backbone.device=gpu", "backbone.device = 'gpu': expected cpu, cuda, or cuda:N"),
        ("backbone.device=cuda:x", "expected cpu, cuda, or cuda:N"),
        ("backbone.quantization=int4", "'int8', 'llm.int8', 'nf4' or 'none'"),
        ("training.max_steps=3", "exactly one of epochs and max_steps"),
        ("training", "expected section.key=value"),
        ("=5", "expected section.key=value"),
        ("adapter=3", "adapter = 3: Input should be an object"),
        ("training.seed=99999999999999999999", "training.seed = 99999999999999999999: Input should be less than"),
        ("training.num_threads=1000000", "Input should be less than or equal to 1024"),
        ("training.learning_rate=inf", "training.learning_rate = inf: Input should be a finite number"),
        ('data.labels=["a", "b", "a"]', "expected two labels or more, each once; 'a' is there twice"),
        ('data.labels=["a"]', "expected two labels or more, each once"),
        ("output.name=x", "output is a value, not a section"),
    ],
)
def test_refusals_name_the_setting(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert said in caught.value.message


def test_what_an_encoder_decoder_cannot_have_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="neftune_alpha knows no encoder-decoders"):
        load_config(file, ["task=seq2seq", "training.neftune_alpha=5"])


def test_a_missing_setting_and_a_missing_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("[training]\nepochs = 1\n")
    with pytest.raises(ConfigError, match=r"output is missing.*data is missing"):
        load_config(tmp_path / "empty.toml")
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


def test_every_setting_says_what_it_means() -> None:
    assert all(field.description for field in (known_settings() | known_entry_settings()).values())


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe: Path) -> None:
    load_run(recipe)


def test_the_mark_that_editors_on_windows_write_is_skipped(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(file).training.epochs == 1
