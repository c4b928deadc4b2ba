"""`trainer run` with `[[adapters]]`: one published directory for each, as a run of its own leaves it."""

from __future__ import annotations

import errno
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from together_runs import QUIET, loaded, train
from together_runs import file as file
from together_runs import given as given
from together_runs import whole as whole
from typer.testing import CliRunner

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.cli import app
from polyhead_trainer.config import load_config
from polyhead_trainer.data import load_examples
from polyhead_trainer.errors import DataError, OutOfMemory, OutputExists, StorageFailed, TrainingDiverged
from polyhead_trainer.evaluate import prepare
from polyhead_trainer.publish import publish
from polyhead_trainer.record import METRICS_FILE, read_record
from polyhead_trainer.run import run
from polyhead_trainer.together.run import TogetherResult, run_together
from polyhead_trainer.tracking import EventFiles


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


def test_one_whose_last_step_ruins_it_is_not_published(file: Path, tmp_path: Path) -> None:
    result = train(file, "adapters.sizes.training.batch_size=99", "adapters.sizes.training.learning_rate=1e30")
    assert list(result.published) == ["colours"]
    with pytest.raises(TrainingDiverged, match=r"sizes: after step 1, the last one, .*published: colours"):
        result.raise_for_failures()
    assert not (tmp_path / "adapters" / "sizes").exists()


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


def test_the_progress_line_tells_of_memory_and_time_left(file: Path) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    run_together(loaded(file), console)
    (last,) = [line for line in console.export_text().splitlines() if "sizes 5/5" in line]
    assert re.search(r"colours 7/7 loss .* tokens/s  peak memory \d+\.\d\d GiB  0 s left$", last)


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
