"""`trainer run` with `[[adapters]]`: one published directory for each, as a run of its own leaves it."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.cli import app
from polyhead_trainer.config import TogetherConfig, load_config, load_run
from polyhead_trainer.data import load_examples
from polyhead_trainer.errors import (
    CheckpointExists,
    DataError,
    OutOfMemory,
    OutputExists,
    ResumeRefused,
    StorageFailed,
    TrainingDiverged,
)
from polyhead_trainer.evaluate import prepare
from polyhead_trainer.publish import publish
from polyhead_trainer.record import METRICS_FILE, read_record
from polyhead_trainer.run import run
from polyhead_trainer.together.run import TogetherResult, run_together
from polyhead_trainer.tracking import EventFiles
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


def losses(result: TogetherResult) -> dict[str, list[tuple[float, float]]]:
    return {name: [(step.loss, step.grad_norm) for step in one.record.curve] for name, one in result.published.items()}


def test_each_is_published_as_a_run_of_its_own_would_be(whole: TogetherResult, tmp_path: Path) -> None:
    assert not whole.failures
    assert {name: len(one.record.curve) for name, one in whole.published.items()} == {"colours": 7, "sizes": 5}
    for one in whole.published.values():
        own = one.record.config
        # Packed, because dropout then falls on tokens laid out alike.
        training = own.training.model_copy(update={"packing": True})
        alone = run(own.model_copy(update={"output": tmp_path / own.output.name, "training": training}), QUIET)
        assert one.record.before == alone.record.before
        assert one.record.trainable == alone.record.trainable
        assert one.record.data == alone.record.data
        expected = [step.loss for step in alone.record.curve]
        assert [step.loss for step in one.record.curve] == pytest.approx(expected, rel=2e-3)
        assert one.record.after.held_out_loss == pytest.approx(alone.record.after.held_out_loss, rel=2e-3)
        assert one.record.after.held_out_loss < one.record.before.held_out_loss
        mine, theirs = (
            load_file(path / "adapter_model.safetensors") for path in (own.output, alone.record.config.output)
        )
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0.05, atol=2e-3)


def test_stock_peft_gives_what_was_measured(whole: TogetherResult) -> None:
    for name, one in whole.published.items():
        config = one.record.config
        backbone = load_backbone(config.backbone.source, cache_dir=config.backbone.cache_dir)
        held_out = load_examples(config.data.held_out, backbone.tokenizer, config.data.max_length)
        evaluator = prepare(config.evaluate, held_out.examples, backbone.tokenizer, backbone.tokenizer.pad_token_id)
        model = PeftModel.from_pretrained(backbone.model, str(config.output))
        assert evaluator.measure(model) == one.record.after
        directory = read_adapter_directory(config.output)
        assert directory.content_hash == one.content_hash
        assert directory.backbone_fingerprint == one.record.backbone.fingerprint
        record = read_record(config.output)
        assert record is not None
        assert record["trained_with"] == [other for other in ("colours", "sizes") if other != name]
        assert {path.name for path in config.output.iterdir()} >= {"README.md", METRICS_FILE}
        assert {path.name for path in config.output.parent.iterdir()} == {"colours", "sizes"}


def test_one_that_diverges_is_reported_and_the_other_published(file: Path, tmp_path: Path) -> None:
    override = "adapters.sizes.training.learning_rate=1e30"
    result = train(file, override)
    assert list(result.published) == ["colours"]
    assert (
        result.published["colours"].record.after.held_out_loss < result.published["colours"].record.before.held_out_loss
    )
    with pytest.raises(TrainingDiverged, match=r"sizes: step \d: loss .*published: colours"):
        result.raise_for_failures()
    left = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert left[:2] == ["colours", "sizes.diverged.json"]
    assert "sizes" not in left
    assert not CheckpointDirectory(tmp_path / "adapters").path.exists()


def test_each_is_told_how_it_has_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One diverges, one is published, and the disk is full at the third."""
    text = file.read_text()
    sizes = text[text.index('[[adapters]]\nname = "sizes"') :]
    for name in ("wild", "more"):
        text += sizes.replace('"sizes"', f'"{name}"')
    file.write_text(text)
    told: list[tuple[str, bool]] = []
    end = EventFiles.end

    def record(self: EventFiles, *, finished: bool) -> None:
        told.append((self.folder.stem, finished))
        end(self, finished=finished)

    def publish_or_fail(tuned: Any, record: Any, events: Any, *, overwrite: bool) -> str:
        if record.config.output.name == "sizes":
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(tuned, record, events, overwrite=overwrite)

    monkeypatch.setattr(EventFiles, "end", record)
    monkeypatch.setattr("polyhead_trainer.together.run.publish", publish_or_fail)
    with pytest.raises(StorageFailed, match="No space left"):
        train(file, "adapters.wild.training.learning_rate=1e30")
    assert sorted(told) == [("colours", True), ("more", False), ("sizes", False), ("wild", False)]


class Killed(BaseException):
    """What no part of the trainer catches."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the run in the optimizer's step of that number, counted over all adapters."""
    usual = torch.optim.AdamW.step
    count = 0

    def set_at(number: int) -> None:
        nonlocal count
        count = 0

        def step(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            return usual(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", step if number else usual)

    return set_at


SAVING = ("checkpoint.every_steps=2", "checkpoint.asynchronous=false")


def test_a_killed_run_continues_bit_for_bit(
    file: Path, tmp_path: Path, whole: TogetherResult, kill_at: Callable[[int], None]
) -> None:
    """Killed before a checkpoint, with both at work, in the last step of one, and after it."""
    # From the third on, two more steps: torch takes one of each optimizer to give it states to load into.
    for number, rounds in ((2, []), (6, [2]), (8, [2, 4]), (6, [4, 6])):
        kill_at(number)
        with pytest.raises(Killed):
            train(file, *SAVING, resume=True)
        assert {path.suffix for path in (tmp_path / "adapters").iterdir()} == {".tensorboard"}, "one was published"
        assert CheckpointDirectory(tmp_path / "adapters").steps() == rounds
    kill_at(0)
    continued = train(file, *SAVING, resume=True)
    assert losses(continued) == losses(whole)
    for name, one in continued.published.items():
        assert one.content_hash == whole.published[name].content_hash
        assert one.record.before == whole.published[name].record.before
    assert not CheckpointDirectory(tmp_path / "adapters").path.exists()


@dataclass
class Counter:
    """An energy counter that advances by 7 J whenever it is read."""

    name: str = "GPU test"
    wraps_at_joules: float | None = None
    joules: float = 0.0

    def read_joules(self) -> float:
        self.joules += 7
        return self.joules


def test_energy_is_shared_out_by_tokens_and_survives_a_kill(
    file: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Callable[[int], None]
) -> None:
    monkeypatch.setattr("polyhead_trainer.together.run.readable_counters", lambda _: [Counter()])
    kill_at(6)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    result = train(file, *SAVING, resume=True)
    records = {name: one.record for name, one in result.published.items()}
    tokens = {name: sum(step.num_tokens for step in record.curve) for name, record in records.items()}
    spent = {name: record.energy_joules["GPU test"] for name, record in records.items()}
    assert sum(spent.values()) == pytest.approx(7 * 7), "seven rounds, those after the checkpoint again"
    assert spent["sizes"] / spent["colours"] == pytest.approx(tokens["sizes"] / tokens["colours"])
    assert (
        "energy of the whole device while training, its part by tokens"
        in (records["sizes"].config.output / "report.html").read_text()
    )


def test_the_progress_line_tells_of_memory_and_time_left(file: Path) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    run_together(loaded(file), console)
    (last,) = [line for line in console.export_text().splitlines() if "sizes 5/5" in line]
    assert re.search(r"colours 7/7 loss .* tokens/s  peak memory \d+\.\d\d GiB  0 s left$", last)


def test_settings_that_change_rounding_alone_may_change_and_are_told_of(
    file: Path, kill_at: Callable[[int], None], whole: TogetherResult
) -> None:
    kill_at(8)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    console = Console(record=True, width=300, file=io.StringIO())
    run_together(loaded(file, *SAVING, "adapters.sizes.training.micro_batch_size=2"), console, resume=True)
    assert "sizes: training.micro_batch_size was null, is 2: from here on" in console.export_text()


def test_an_adapter_that_had_stopped_early_stays_so(file: Path, tmp_path: Path, kill_at: Callable[[int], None]) -> None:
    settings = ("evaluate_every=1", "early_stopping_patience=1", "keep=best", "learning_rate=3")
    overrides = [f"adapters.sizes.training.{setting}" for setting in settings]
    undisturbed = train(file, *overrides, f'output="{tmp_path}/undisturbed"')
    num_steps = {name: len(one.record.curve) for name, one in undisturbed.published.items()}
    assert num_steps["sizes"] < 5
    assert num_steps["colours"] == 7
    kill_at(sum(num_steps.values()))
    with pytest.raises(Killed):
        train(file, *overrides, "checkpoint.every_steps=1", "checkpoint.asynchronous=false")
    kill_at(0)
    result = train(file, *overrides, "checkpoint.every_steps=1", resume=True)
    assert losses(result) == losses(undisturbed)


def test_streamed_data_continue_where_they_stood(file: Path, tmp_path: Path, kill_at: Callable[[int], None]) -> None:
    streamed = ("adapters.colours.data.streaming=true", "adapters.colours.data.shuffle_buffer=8")
    undisturbed = train(file, *streamed, f'output="{tmp_path}/undisturbed"')
    kill_at(10)
    with pytest.raises(Killed):
        train(file, *streamed, *SAVING)
    kill_at(0)
    continued = train(file, *streamed, *SAVING, resume=True)
    assert losses(continued) == losses(undisturbed)
    assert continued.published["colours"].record.data.num_train_tokens is None


def test_killed_between_two_publications(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead_trainer.together import run as module

    usual, published = module.publish, []

    def die_at_the_second(*args: Any, **options: Any) -> str:
        if published:
            raise Killed
        published.append(usual(*args, **options))
        return published[0]

    monkeypatch.setattr(module, "publish", die_at_the_second)
    with pytest.raises(Killed):
        train(file)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["colours", "sizes.tensorboard"]
    monkeypatch.setattr(module, "publish", usual)
    result = train(file, resume=True)
    assert result.published["colours"].content_hash == published[0]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["colours", "sizes"]


def test_a_diverged_adapter_stays_so_when_the_run_continues(file: Path, kill_at: Callable[[int], None]) -> None:
    override = "adapters.sizes.training.learning_rate=1e30"
    kill_at(8)
    with pytest.raises(Killed):
        train(file, override, *SAVING)
    kill_at(0)
    result = train(file, override, *SAVING, resume=True)
    assert "sizes.diverged.json" in result.failures["sizes"].message
    assert len(result.published["colours"].record.curve) == 7


def test_an_unfinished_run_is_neither_ignored_nor_taken_for_another(file: Path, kill_at: Callable[[int], None]) -> None:
    kill_at(6)
    with pytest.raises(Killed):
        train(file, *SAVING)
    kill_at(0)
    with pytest.raises(CheckpointExists, match="--resume"):
        train(file)
    with pytest.raises(ResumeRefused, match=r"adapter sizes, belongs to another run: training.seed was 5, is 6"):
        train(file, "adapters.sizes.training.seed=6", resume=True)
    text = file.read_text()
    file.write_text(text.replace('name = "sizes"', 'name = "widths"'))
    with pytest.raises(ResumeRefused, match=r"its \[\[adapters\]\] were colours, sizes, and are colours, widths"):
        train(file, resume=True)


def test_a_finished_adapter_is_replaced_only_when_asked(file: Path, tmp_path: Path, whole: TogetherResult) -> None:
    (tmp_path / "adapters").mkdir()
    shutil.copytree(whole.published["sizes"].record.config.output, tmp_path / "adapters/sizes")
    for options in ({}, {"resume": True}):
        with pytest.raises(OutputExists, match=r"adapters/sizes holds a finished run.*--overwrite"):
            train(file, **options)
    assert not (tmp_path / "adapters/colours").exists()
    again = train(file, overwrite=True)
    assert {name: one.content_hash for name, one in again.published.items()} == {
        name: one.content_hash for name, one in whole.published.items()
    }


def test_early_stopping_and_the_best_weights_are_each_adapters_own(file: Path) -> None:
    settings = ("evaluate_every=1", "early_stopping_patience=1", "keep=best", "learning_rate=3")
    result = train(file, *(f"adapters.sizes.training.{setting}" for setting in settings))
    sizes, colours = result.published["sizes"].record, result.published["colours"].record
    assert len(sizes.curve) < 5
    assert sizes.after.held_out_loss == min(loss for _, loss in sizes.held_out_curve)
    assert len(colours.curve) == 7
    assert colours.held_out_curve == []


def test_several_processes_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[\[adapters\]\] are trained together in one process, and 2 were started"):
        train(file, nproc=2)


@pytest.mark.slow
def test_memory_that_runs_out_names_what_needs_less(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("polyhead_trainer.together.loop._round", fail)
    with pytest.raises(OutOfMemory) as caught:
        train(file)
    assert "no more; `trainer estimate` expects on each rank: weights " in caught.value.message
    assert "settings that need less: training.micro_batch_size = " in caught.value.message


def test_memory_that_is_not_even_there_for_the_estimate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("polyhead_trainer.together.model.SharedBackbone.accumulate_gradients", fail)
    with pytest.raises(OutOfMemory, match=r"no more; what the run needs cannot be estimated \(no more\)"):
        train(file)


def test_data_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        train(file, 'adapters.sizes.data.train=["nowhere.jsonl"]')


def test_the_command(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(file), "--set", "adapters.sizes.training.epochs=2"])
    assert result.exit_code == 0, result.output
    assert "sizes 10/10" in result.output.replace("\n", " ")
    assert (tmp_path / "adapters/colours/README.md").read_text().count("# Colours of things") == 1
    with pytest.raises(ConfigError, match=r"several adapters.*for `trainer run` alone"):
        load_config(file)
