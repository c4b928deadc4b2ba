"""A run of two small adapters trained together, `colours` and `sizes`, on a tiny backbone.

Tests import the fixtures `as` themselves, which ruff takes for a use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polyhead_trainer.config import TogetherConfig, load_run
from polyhead_trainer.together.run import TogetherResult, run_together
from tiny import save_backbone

QUIET = Console(quiet=True)
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "lemon": "yellow"}
SIZES = {"grass": "short", "snow": "deep", "coal": "small", "blood": "little", "sky": "endless", "lemon": "handy"}


def write_data(folder: Path, what: str, values: dict[str, str]) -> None:
    lines = [
        json.dumps({"prompt": f"{what} of {thing}, {number}:", "completion": f" {value}" * (1 + number % 2)})
        for number in range(4)
        for thing, value in values.items()
    ]
    (folder / f"{what}.jsonl").write_text("\n".join(lines[6:]))
    (folder / f"{what}-held-out.jsonl").write_text("\n".join(lines[:6]))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a backbone."""
    folder = tmp_path_factory.mktemp("given")
    write_data(folder, "colour", COLOURS)
    write_data(folder, "size", SIZES)
    save_backbone("llama", folder / "backbone")
    return folder


@pytest.fixture
def file(given: Path, tmp_path: Path) -> Path:
    return write_run(given, tmp_path)


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> TogetherResult:
    """Of a run that nobody disturbed."""
    return train(write_run(given, tmp_path_factory.mktemp("whole")))


def write_run(given: Path, folder: Path) -> Path:
    (folder / "run.toml").write_text(f"""
output = "{folder}/adapters"
[backbone]
source = "{given}/backbone"
cache_dir = "{given}/cache"
[adapter]
rank = 4
[training]
max_steps = 7
batch_size = 6
learning_rate = 5e-3
num_threads = 1
[evaluate]
generate_examples = 2
max_new_tokens = 3
[checkpoint]
every_steps = 0

[[adapters]]
name = "colours"
title = "Colours of things"
adapter = {{ dropout = 0.2, target_modules = ["q_proj", "up_proj"] }}
data = {{ train = ["{given}/colour.jsonl"], held_out = ["{given}/colour-held-out.jsonl"] }}

[[adapters]]
name = "sizes"
[adapters.adapter]
rank = 10
alpha = 3
use_rslora = true
layers = [1, 2]
[adapters.data]
train = ["{given}/size.jsonl"]
held_out = ["{given}/size-held-out.jsonl"]
[adapters.training]
epochs = 1
batch_size = 4
learning_rate = 1e-2
seed = 5
""")
    return folder / "run.toml"


def loaded(file: Path, *overrides: str) -> TogetherConfig:
    config = load_run(file, overrides)
    assert isinstance(config, TogetherConfig)
    return config


def train(file: Path, *overrides: str, **options: Any) -> TogetherResult:
    return run_together(loaded(file, *overrides), QUIET, **options)
