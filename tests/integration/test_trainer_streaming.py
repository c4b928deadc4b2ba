"""Runs on streamed data: killed and continued bit for bit, packed or not, on every kind of source."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.config import load_config
from polyhead_trainer.parallel.launch import launch
from trainer_processes import curve, die_at_disk_call, finish, write_run

STREAMED = ("data.streaming=true", "data.shuffle_buffer=5")


def write_mixed_run(folder: Path, steps: int = 12) -> tuple[Path, tuple[str, ...]]:
    """A run on a data set of save_to_disk, a CSV and a JSONL file, and what it must be told."""
    file = write_run(folder, steps=steps)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    asked = [{"question": one["prompt"], "answer": one["completion"]} for one in records]
    # Of another length in another place: not every batch of a window is of one file.
    Dataset.from_list(asked[:7]).save_to_disk(folder / "saved")
    with (folder / "asked.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["question", "answer"])
        writer.writeheader()
        writer.writerows(asked[7:12])
    (folder / "rest.jsonl").write_text("\n".join(map(json.dumps, records[12:])))
    names = ", ".join(f'"{folder / name}"' for name in ("saved", "asked.csv", "rest.jsonl"))
    return file, (f"data.train=[{names}]", "data.columns.prompt=question", "data.columns.completion=answer", *STREAMED)


def metrics(file: Path) -> dict[str, Any]:
    found = json.loads((file.parent / "adapters/colours/polyhead_metrics.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody interrupted: 12 steps of 7 examples out of 18, so of almost five epochs."""
    file, overrides = write_mixed_run(tmp_path_factory.mktemp("whole"))
    assert finish(file, *overrides) == 0
    return file


def test_killed_again_and_again_and_continued(tmp_path: Path, whole: Path) -> None:
    file, overrides = write_mixed_run(tmp_path / "killed")
    kills, seen = 0, set()
    # 24 disk calls get it at least one checkpoint further.
    while finish(file, *overrides, resume=True, prepare=die_at_disk_call, argument=24) != 0:
        kills += 1
        seen |= set(CheckpointDirectory(file.parent / "adapters/colours").steps())
        assert kills < 12
    assert kills >= 3
    assert len(seen) >= 3
    assert curve(file) == curve(whole)
    outputs = [one.parent / "adapters/colours/adapter_model.safetensors" for one in (file, whole)]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_the_record_says_what_is_known(whole: Path) -> None:
    data = metrics(whole)["data"]
    assert (data["num_train"], data["num_train_tokens"], data["num_too_long"]) == (18, None, 0)


def test_another_content_is_another_run(tmp_path: Path) -> None:
    file, overrides = write_mixed_run(tmp_path)
    assert finish(file, *overrides, prepare=die_at_disk_call, argument=24) < 0
    Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(tmp_path / "saved")
    assert finish(file, *overrides, resume=True) == 1
    assert "the contents of the data are others" in file.with_suffix(".error").read_text()


def test_packed_and_padded_streams_learn_the_same(tmp_path: Path) -> None:
    losses = []
    for packing in ("true", "false"):
        file = write_run(tmp_path / packing, steps=4, dropout=0.0, quantization="none")
        assert finish(file, *STREAMED, f"training.packing={packing}") == 0
        losses.append([loss for loss, _ in curve(file)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_held_out_example_in_a_stream_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text() + "\n" + (tmp_path / "held_out.jsonl").read_text().splitlines()[2])
    assert finish(file, *STREAMED) == 1
    error = file.with_suffix(".error").read_text()
    assert error.startswith(f"DataError: {tmp_path}/held_out.jsonl:3: this held-out example is learned too: {train}:19")


@pytest.mark.slow
def test_two_ranks_stream_what_one_process_does(tmp_path: Path) -> None:
    file = write_run(tmp_path, steps=6, dropout=0.0, quantization="none")
    assert finish(file, *STREAMED) == 0
    launch(load_config(file, [*STREAMED, f"output={tmp_path}/two"]), 2, overwrite=False, resume=False)
    two = json.loads((tmp_path / "two/polyhead_metrics.json").read_text())["curve"]
    assert [step["loss"] for step in two] == pytest.approx([loss for loss, _ in curve(file)], rel=1e-4)
