"""Two runs into one output: the second is refused while the first is there, whatever it died of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console
from together_runs import file as file
from together_runs import given as given
from together_runs import loaded

from polyhead_trainer.config import load_config
from polyhead_trainer.errors import OutputBusy, StorageFailed
from polyhead_trainer.run import run
from polyhead_trainer.run_lock import only_run_into
from polyhead_trainer.together.run import run_together
from trainer_processes import holding, write_run


def test_the_lock_is_of_the_process_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "adapters" / "colours"
    for kill in (False, True):
        process, leave = holding(output)
        with pytest.raises(OutputBusy, match="choose another output"), only_run_into(output):
            pass
        with only_run_into(output.with_name("other")):
            pass
        process.kill() if kill else leave.set()
        process.join()
        with only_run_into(output):
            assert os.listdir(output.parent) == [".colours.lock"]
        assert not output.parent.exists() or not os.listdir(output.parent)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageFailed, match=r"cannot write .*file/out: "), only_run_into(tmp_path / "file" / "out"):
        pass


def test_a_run_takes_it_before_the_first_step(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, steps=2))
    with only_run_into(config.output):
        for resume in (False, True):
            with pytest.raises(OutputBusy, match="another process is training into"):
                run(config, Console(quiet=True), resume=resume)
    run(config, Console(quiet=True))
    assert sorted(os.listdir(config.output.parent)) == ["colours"]


def test_adapters_trained_together_take_it_too(file: Path) -> None:
    config = loaded(file)
    with only_run_into(config.output), pytest.raises(OutputBusy):
        run_together(config, Console(quiet=True))
