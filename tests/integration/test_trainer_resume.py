"""Checkpoints: a run that was killed at any moment, continued, is the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from polyhead_trainer.checkpoint import CheckpointDirectory, SavedRun
from polyhead_trainer.config import load_config
from polyhead_trainer.errors import CheckpointExists, ResumeRefused
from polyhead_trainer.run import run
from trainer_processes import curve, die_at_disk_call, finish, kill_after, limit_file_size, start, write_run


def output(file: Path) -> Path:
    return file.parent / "adapters/colours"


def weights(file: Path) -> bytes:
    return (output(file) / "adapter_model.safetensors").read_bytes()


def steps(file: Path) -> list[int]:
    return CheckpointDirectory(output(file)).steps()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody interrupted."""
    file = write_run(tmp_path_factory.mktemp("whole"))
    assert finish(file) == 0
    assert not CheckpointDirectory(output(file)).path.exists(), "checkpoints must go once the output is published"
    return file


def copy_of(whole: Path, folder: Path) -> Path:
    """The same run, not started."""
    shutil.copytree(whole.parent, folder, ignore=shutil.ignore_patterns("adapters"))
    return write_run(folder)


def interrupted(whole: Path, folder: Path, *overrides: str) -> Path:
    """A run that died after some checkpoints."""
    file = copy_of(whole, folder)
    number = 0
    while not steps(file):
        number += 15
        finish(file, *overrides, resume=True, prepare=die_at_disk_call, argument=number)
    assert not output(file).exists()
    return file


def test_killed_between_any_two_disk_calls_and_continued(tmp_path: Path, whole: Path) -> None:
    file = copy_of(whole, tmp_path / "killed")
    seen, number, kills = [], 5, 0
    while finish(file, resume=True, prepare=die_at_disk_call, argument=number) != 0:
        kills += 1
        complete = steps(file)
        seen.append(complete[-1] if complete else 0)
        for step in complete:
            saved = SavedRun.read(CheckpointDirectory(output(file)).at(step))
            assert saved.step == step
            assert len(saved.hooks["progress"]["history"]) == step
        number += 1
        assert number < 60
    assert kills >= 10
    assert seen == sorted(seen), "a kill must never lose a checkpoint that was there"
    assert curve(file) == curve(whole)
    assert weights(file) == weights(whole)
    assert [path.name for path in output(file).parent.iterdir() if path.name[0] != "."] == ["colours"]


def test_killed_at_random_moments_and_continued(tmp_path: Path, whole: Path) -> None:
    file = copy_of(whole, tmp_path / "killed")
    draw = random.Random(0)
    for _ in range(6):
        process = start(file, resume=True)
        kill_after(process, draw.uniform(0.3, 1.5))
        if process.exitcode == 0:
            break
    if not output(file).exists():
        assert finish(file, resume=True) == 0
    assert curve(file) == curve(whole)
    assert weights(file) == weights(whole)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_every_weight_and_waiting_for_the_disk(tmp_path: Path, asynchronous: str) -> None:
    override = f"checkpoint.asynchronous={asynchronous}"
    files = [write_run(tmp_path / name, method="full", quantization="none", steps=5) for name in ("whole", "killed")]
    assert finish(files[0], override) == 0
    while finish(files[1], override, resume=True, prepare=die_at_disk_call, argument=33) != 0:
        assert steps(files[1])
    assert curve(files[0]) == curve(files[1])


def test_a_checkpoint_is_neither_ignored_nor_given_to_another_run(tmp_path: Path, whole: Path) -> None:
    file = interrupted(whole, tmp_path / "killed")
    quiet = Console(quiet=True)
    with pytest.raises(CheckpointExists, match="--resume"):
        run(load_config(file), quiet)
    changed = load_config(file, ["training.learning_rate=1e-4", "adapter.rank=2"])
    with pytest.raises(ResumeRefused, match=r"adapter.rank was 4, is 2; training.learning_rate was 0.002, is 0.0001"):
        run(changed, quiet, resume=True)
    data = file.parent / "train.jsonl"
    text = data.read_text()
    data.write_text(text.replace("grass", "trees"))
    with pytest.raises(ResumeRefused, match="contents of the data"):
        run(load_config(file), quiet, resume=True)
    data.write_text(text)
    run(load_config(file, ["title=Colours", "evaluate.show=0"]), quiet, resume=True)
    assert curve(file) == curve(whole)


class Killed(BaseException):
    """What no part of the trainer catches."""


def test_a_run_that_stopped_early_and_died_before_publication_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("evaluate_every=1", "early_stopping_patience=1", "keep=best", "learning_rate=0.5")
    overrides = [f"training.{setting}" for setting in how] + ["checkpoint.every_steps=1"]
    undisturbed, file = (write_run(tmp_path / name, quantization="none") for name in ("whole", "killed"))
    quiet = Console(quiet=True)
    run(load_config(undisturbed, overrides), quiet)
    assert len(curve(undisturbed)) < 12

    def die(*_: object, **__: object) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("polyhead_trainer.run.publish", die)
        with pytest.raises(Killed):
            run(load_config(file, overrides), quiet)
    console = Console(record=True, width=200)
    run(load_config(file, overrides), console, resume=True)
    assert "stopped: the held-out loss has not fallen" in console.export_text()
    assert curve(file) == curve(undisturbed)
    assert weights(file) == weights(undisturbed)


def test_what_saves_memory_may_change_and_is_told_of(tmp_path: Path) -> None:
    undisturbed, file = (write_run(tmp_path / name, quantization="none", dropout=0.0) for name in ("whole", "killed"))
    assert finish(undisturbed) == 0
    number = 0
    while not steps(file):
        number += 15
        finish(file, resume=True, prepare=die_at_disk_call, argument=number)
    less = ["training.micro_batch_size=2", "training.activation_checkpointing=all", "evaluate.batch_size=2"]
    console = Console(record=True, width=400)
    run(load_config(file, [*less, "training.logit_chunk=600"]), console, resume=True)
    told = console.export_text()
    assert "evaluate.batch_size was 32, is 2; training.activation_checkpointing was " in told
    assert (
        "training.micro_batch_size was null, is 2: from here on results equal those of an undisturbed run up to" in told
    )
    for found, expected in zip(curve(file), curve(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_other_texts_to_measure_on_and_another_type_make_another_run(tmp_path: Path, whole: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text("An adapter is small. " * 9)
    earlier = shutil.copy(whole.parent / "held_out.jsonl", tmp_path / "earlier.jsonl")
    measured = [f"evaluate.general_text={text}", f'evaluate.earlier=["{earlier}"]']
    file = interrupted(whole, tmp_path / "killed", *measured)
    quiet = Console(quiet=True)
    for changed in (text, earlier):
        before = changed.read_text()
        changed.write_text(before.replace("a", "o"))
        with pytest.raises(ResumeRefused, match=r"contents of evaluate\.earlier or evaluate\.general_text are others"):
            run(load_config(file, measured), quiet, resume=True)
        changed.write_text(before)
    with pytest.raises(ResumeRefused, match=r"parallel\.param_dtype was null, is \"bfloat16\""):
        run(load_config(file, [*measured, "parallel.param_dtype=bfloat16"]), quiet, resume=True)
    run(load_config(file, [*measured, "parallel.strategy=ddp"]), quiet, resume=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, whole: Path) -> None:
    file = interrupted(whole, tmp_path / "killed")
    before = steps(file)
    assert finish(file, resume=True, prepare=limit_file_size, argument=40_000) == 1
    message = file.with_suffix(".error").read_text()
    assert message.startswith("StorageFailed: cannot write ")
    assert "File too large; free some space, then continue; the last good checkpoint is" in message
    assert steps(file) == before
    assert not list(CheckpointDirectory(output(file)).path.glob(".*"))
    assert finish(file, resume=True) == 0
    assert curve(file) == curve(whole)


def test_a_full_disk_at_the_end_leaves_no_output_and_loses_no_step(tmp_path: Path, whole: Path) -> None:
    file = interrupted(whole, tmp_path / "killed")
    # With no further checkpoint due, the output alone meets the limit.
    assert finish(file, "checkpoint.every_steps=0", resume=True, prepare=limit_file_size, argument=9_000) == 1
    message = file.with_suffix(".error").read_text()
    assert message.startswith("StorageFailed: cannot write ")
    assert "the trained state is in" in message
    assert not output(file).exists()
    assert not [path for path in output(file).parent.iterdir() if path.name.startswith(".colours")]
    assert finish(file, resume=True) == 0
    assert curve(file) == curve(whole)
