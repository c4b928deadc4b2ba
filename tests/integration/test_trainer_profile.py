"""`[profile]`: a trace and a table of operators, and nothing else changed."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from test_trainer_run import configuration, run_quietly, tiny, write_data

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import TogetherConfig, load_run
from polyhead_trainer.record import read_record
from polyhead_trainer.run import run
from polyhead_trainer.together.run import run_together


def trace_of(folder: Path) -> list[str]:
    """Names of the events in the only trace."""
    (file,) = folder.iterdir()
    assert file.name == "rank0.pt.trace.json.gz"
    return [event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if "name" in event]


def test_some_steps_are_profiled_and_the_run_is_the_same(tmp_path: Path) -> None:
    plain = run_quietly(configuration(tmp_path, "training.max_steps=4"))
    config = configuration(
        tmp_path, "training.max_steps=4", "profile.steps=2", "profile.after=1", f"output={tmp_path}/profiled"
    )
    console = Console(record=True, width=200)
    result = run(config, console)
    assert [step.loss for step in result.record.curve] == [step.loss for step in plain.record.curve]
    operators = result.record.operators
    assert sum(one.share for one in operators) == pytest.approx(1.0)
    assert operators == sorted(operators, key=lambda one: -one.seconds)
    (backward,) = [one for one in operators if "int8_linear_backward" in one.name or one.name == "aten::mm"][:1]
    assert backward.calls == int(backward.calls) > 0
    record = read_record(config.output)
    assert record is not None
    assert [one["name"] for one in record["operators"]] == [one.name for one in operators]
    shown = console.export_text()
    assert "where the time of a profiled step goes" in shown
    assert operators[0].name in shown
    assert operators[0].name in (config.output / "report.html").read_text(encoding="utf-8")
    names = trace_of(tmp_path / "profiled.profile")
    assert sum(bool(re.match(r"Optimizer.step#", name)) for name in names) == 2
    assert not (tmp_path / "adapters" / "colours.profile").exists()


def test_a_run_that_ends_within_the_profiled_steps_keeps_what_there_was(tmp_path: Path) -> None:
    result = run_quietly(configuration(tmp_path, "profile.steps=50", "profile.after=0", "profile.memory=true"))
    assert result.record.operators
    assert sum("Optimizer.step#" in name for name in trace_of(tmp_path / "adapters" / "colours.profile")) == 3


def test_steps_that_will_never_come_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile.after = 3: the run has 3 steps to do"):
        run_quietly(configuration(tmp_path, "profile.steps=1", "profile.after=3"))
    assert not (tmp_path / "adapters").exists()


def test_rounds_of_several_adapters_are_profiled(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "run.toml").write_text(f"""
output = "{tmp_path}/adapters"
[backbone]
source = "{tiny(tmp_path)}"
cache_dir = "{tmp_path}/cache"
[data]
train = ["{tmp_path}/train.jsonl"]
held_out = ["{tmp_path}/held_out.jsonl"]
[training]
max_steps = 4
batch_size = 4
[evaluate]
generate_examples = 0
[profile]
steps = 1
[[adapters]]
name = "a"
[[adapters]]
name = "b"
training = {{ seed = 1 }}
""")
    config = load_run(tmp_path / "run.toml")
    assert isinstance(config, TogetherConfig)
    console = Console(record=True, width=200)
    run_together(config, console)
    assert "where the time of a profiled step goes" in console.export_text()
    assert sum("Optimizer.step#" in name for name in trace_of(tmp_path / "adapters.profile")) == 2
