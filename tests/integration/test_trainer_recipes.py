"""Every recipe that ships, on its own real data: a few steps on a tiny backbone (`make test-trainer`: in full)."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_trainer_run import run_quietly
from test_trainer_seq2seq import save_encoder_decoder
from test_trainer_serving import served_loss
from transformers import AutoTokenizer

from polyhead_client import Client
from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_trainer.config import LoraSettings, RunConfig, parse_config
from polyhead_trainer.config.adapter import METHODS
from polyhead_trainer.config.together import TogetherConfig, parse_together
from polyhead_trainer.data import EncodedExample, load_examples
from polyhead_trainer.demo_data import prepare
from polyhead_trainer.objectives.preference import EncodedPair
from polyhead_trainer.recipe_book import find_recipe, recipes
from polyhead_trainer.record import read_record
from polyhead_trainer.reevaluate import measure, read_subject
from polyhead_trainer.tasks import open_task
from polyhead_trainer.together.run import run_together
from running_server import RunningServer
from tiny import save_backbone

TOGETHER = [recipe.name for recipe in recipes() if "[[adapters]]" in recipe.text]
NAMES = [recipe.name for recipe in recipes() if recipe.name not in TOGETHER]
NEEDS = {"second_task_full": "full", "second_task_same_adapter": "tweet_sentiment"}
"""Recipes that go on where another one ended."""
SMALLER = {
    "training": {"max_steps": 2, "batch_size": 2},
    "evaluate": {"max_examples": 3, "generate_examples": 1, "max_new_tokens": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, default_directory: Path) -> Path:
    """A working directory with the recipes' data and a tiny backbone that has the default one's tokenizer."""
    folder = tmp_path_factory.mktemp("recipes")
    prepare(folder / "data")
    for file in (folder / "data").rglob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join(lines[:40]) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(default_directory)
    save_backbone("llama", folder / "backbone", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "backbone")
    save_encoder_decoder(folder / "encoder_decoder")
    return folder


def configuration(name: str) -> RunConfig:
    """The recipe as it is but for its size and, unless it names one, its backbone."""
    values: dict[str, Any] = tomllib.loads(find_recipe(name).text)
    for section, smaller in SMALLER.items():
        values[section].update(smaller)
    values["training"].pop("epochs", None)
    if "general_text" in values["evaluate"]:
        values["evaluate"]["general_tokens"] = 64
    if "layers" in values["adapter"]:
        values["adapter"]["layers"] = [1, 2]
    if "last_layers" in values["adapter"]:
        values["adapter"]["last_layers"] = 2
    values.setdefault("backbone", {}).setdefault("source", "backbone")
    if values.get("task") == "seq2seq":  # the hub's model is not there
        values["backbone"]["source"] = "encoder_decoder"
    values["backbone"]["cache_dir"] = "cache"
    return parse_config(values, name)


def run_once(name: str) -> None:
    config = configuration(name)
    if not config.output.exists():
        if name in NEEDS:
            run_once(NEEDS[name])
        run_quietly(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_and_its_output_is_read_back(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    run_once(name)
    config = configuration(name)
    again = measure(read_subject(config.output, []))
    record = read_record(config.output)
    assert record is not None
    assert again.after.answers == record["after"]["answers"]
    assert again.after.held_out_loss == pytest.approx(record["after"]["held_out_loss"], rel=1e-5)
    assert again.after.held_out_loss != again.before.held_out_loss, "two steps changed nothing"
    if config.evaluate.earlier:
        assert again.after.earlier_loss is not None


def configuration_together(name: str) -> TogetherConfig:
    values: dict[str, Any] = tomllib.loads(find_recipe(name).text)
    values["backbone"] = {"source": "backbone", "cache_dir": "cache"}
    values["adapter"]["layers"] = [1, 2]
    values["evaluate"]["general_tokens"] = 64
    for entry in values["adapters"]:
        for section, smaller in SMALLER.items():
            entry[section].update(smaller)
        entry["training"].pop("epochs", None)
    return parse_together(values, name)


@pytest.mark.parametrize("name", TOGETHER)
def test_a_recipe_of_several_adapters_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    config = configuration_together(name)
    assert len(config.runs) > 1
    result = run_together(config, Console(quiet=True))
    assert result.published.keys() == config.runs.keys()
    for one in result.published.values():
        again = measure(read_subject(one.record.config.output, []))
        assert again.after == one.record.after
        assert again.after.held_out_loss != again.before.held_out_loss, "two steps changed nothing"


def is_served(config: RunConfig) -> bool:
    lora = isinstance(config.adapter, LoraSettings) and not config.adapter.use_dora
    return lora and config.task in ("completion", "preference")


def served_reward_margin(client: Client, adapter: str, pairs: list[EncodedPair], beta: float) -> float:
    def log_prob(tokens: EncodedExample, name: str | None) -> float:
        scored = client.score(tokens.token_ids, adapter=name).tokens
        return sum(one.logprob for one, is_label in zip(scored, tokens.is_label, strict=True) if is_label)

    def reward(tokens: EncodedExample) -> float:
        return beta * (log_prob(tokens, adapter) - log_prob(tokens, None))

    return sum(reward(pair.chosen) - reward(pair.rejected) for pair in pairs) / len(pairs)


def test_recipes_of_the_lora_family_are_served_as_they_were_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    configs = {name: config for name in NAMES if is_served(config := configuration(name))}
    for name in configs:
        run_once(name)
    for name in TOGETHER:
        together = configuration_together(name)
        run_together(together, Console(quiet=True), overwrite=True)
        configs |= together.runs
    for name, config in configs.items():
        shutil.copytree(config.output, tmp_path / "adapters" / name)
    backbone = load_backbone("backbone", cache_dir=Path("cache"))
    server = RunningServer(
        tmp_path / "log", backbone=folder / "backbone", cache=folder / "cache", adapters=tmp_path / "adapters",
        kv_dtype="float32", adapter_dtype="float32",
    )  # fmt: skip
    with server, Client(server.address) as client:
        for name, config in configs.items():
            encode = open_task(config, backbone).encode
            data = config.data
            held_out = load_examples(data.held_out, backbone.tokenizer, data.max_length, encode, data.columns).examples
            measured = held_out[: config.evaluate.max_examples]
            record = read_record(config.output)
            assert record is not None
            after = record["after"]
            prompt = held_out[0].token_ids[: held_out[0].prompt_length]
            answer = client.generate(prompt, adapter=name, max_tokens=config.evaluate.max_new_tokens, temperature=0.0)
            assert answer.text == after["answers"][0], name
            assert answer.adapter is not None
            assert answer.adapter.content_hash == read_adapter_directory(config.output).content_hash
            if config.task == "preference":
                pairs = [pair for pair in measured if isinstance(pair, EncodedPair)]
                margin = served_reward_margin(client, name, pairs, config.preference.beta)
                assert margin == pytest.approx(after["reward_margin"], rel=0.2), name
            else:
                # As in test_trainer_serving: int8 activations are rounded, and a fused layer sums up in another order.
                assert served_loss(client, name, measured) == pytest.approx(after["held_out_loss"], rel=3e-3), name


def test_every_method_has_a_recipe() -> None:
    configurations = [configuration(name) for name in NAMES]
    assert {config.adapter.method for config in configurations} == METHODS.keys()
    assert {config.task for config in configurations} == {"completion", "classification", "preference", "seq2seq"}
    assert all(config.data.license for config in configurations)


def test_recipes_open_with_a_line_that_tells_them_apart() -> None:
    summaries = [recipe.summary for recipe in recipes()]
    assert all("Data: `trainer demo-data data`." in summary for summary in summaries)
    assert len(set(summaries)) == len(summaries)
