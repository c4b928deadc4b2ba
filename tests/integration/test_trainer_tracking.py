"""What trackers are told of a run, read back with their own readers; a run that was interrupted is told once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer_run import configuration, run_quietly

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import RunConfig
from polyhead_trainer.errors import MissingExtra, StorageFailed
from polyhead_trainer.evaluate import Evaluator
from polyhead_trainer.progress import TrainingProgress
from polyhead_trainer.record import RunRecord
from polyhead_trainer.run import run
from polyhead_trainer.tracking import EventFiles, unwinding_at_sigterm
from polyhead_trainer.tracking.mlflow import MlflowTracker
from trainer_processes import finish

MEASURED = "training.evaluate_every=2"
PATTERN = r"layers\.(0|1)\.self_attn\.q_proj"
PATTERN_NAME = "layers_._0_1__.self_attn_.q_proj"
"""In MLflow, which takes no regular expressions for names."""
Series = dict[str, list[tuple[int, float]]]


def read_events(folder: Path) -> Series:
    """(step, value) of each scalar."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if tag != "train/tokens_per_s"
    }


def single(value: float) -> float:
    return float(np.float32(value))


def expected(record: RunRecord, number: Any = single) -> Series:
    """As the record has it; `number`: in the precision that a tracker keeps."""
    curve = record.curve
    series = {
        "train/loss": [(report.step, number(report.loss)) for report in curve],
        "train/grad_norm": [(report.step, number(report.grad_norm)) for report in curve],
        "train/learning_rate": [(report.step, number(report.learning_rate)) for report in curve],
        "held_out/loss": [
            (step, number(loss)) for step, loss in [(0, record.before.held_out_loss), *record.held_out_curve]
        ],
    }
    for field in dataclasses.fields(record.before):
        before, after = getattr(record.before, field.name), getattr(record.after, field.name)
        if isinstance(before, float):
            series[f"measures/{field.name}"] = [(0, number(before)), (len(curve), number(after))]
    return series


def interrupt(monkeypatch: pytest.MonkeyPatch, config: RunConfig, at_step: int) -> None:
    """Runs until after this step, as if somebody had pressed Control-C."""
    after_step = TrainingProgress.after_step

    def interrupted(self: TrainingProgress, loop: Any, report: Any) -> None:
        after_step(self, loop, report)
        if report.step == at_step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "after_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(config)


def test_event_files_of_a_finished_run(tmp_path: Path) -> None:
    config = configuration(tmp_path, MEASURED)
    record = run_quietly(config).record
    assert read_events(config.output / "tensorboard") == expected(record)
    assert [step for step, _ in record.held_out_curve] == [2, 3]
    assert [file.name for file in (config.output / "tensorboard").iterdir()] == ["events.out.tfevents.0"]
    assert [path.name for path in config.output.parent.iterdir()] == ["colours"]
    accumulator = EventAccumulator(str(config.output / "tensorboard"))
    accumulator.Reload()
    text = accumulator.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    adapter.rank = 4\n" in text


def test_a_continued_run_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (MEASURED, "training.max_steps=6", "checkpoint.every_steps=2", "checkpoint.asynchronous=false")
    config = configuration(tmp_path, *overrides)
    interrupt(monkeypatch, config, at_step=5)
    live = EventFiles(config.output).folder
    assert [step for step, _ in read_events(live)["train/loss"]] == [1, 2, 3, 4]
    assert not config.output.exists()
    (live / "notes.txt").write_text("mine")
    record = run(config, Console(quiet=True), resume=True).record
    assert [report.step for report in record.curve] == [1, 2, 3, 4, 5, 6]
    assert read_events(config.output / "tensorboard") == expected(record)
    assert [path.name for path in live.iterdir()] == ["notes.txt"], "what is not the run's stays"


def test_a_run_that_diverges_leaves_its_events(tmp_path: Path) -> None:
    config = configuration(tmp_path, "training.learning_rate=1e30", "training.warmup=0.0")
    with pytest.raises(Exception, match="not a number any more"):
        run_quietly(config)
    assert len(read_events(EventFiles(config.output).folder)["train/loss"]) >= 1


class Told:
    """A tracker that keeps how its run has ended."""

    def __init__(self, output: Path, broken: bool = False) -> None:
        self.name = "told"
        self.output = output
        self.broken = broken
        self.ends: list[tuple[bool, bool]] = []
        """(finished, whether the output was there)."""

    def begin(self, run_name: str, settings: Mapping[str, str], identity: str | None) -> str | None:
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert not self.ends

    def flush(self) -> None:
        pass

    def end(self, *, finished: bool) -> None:
        self.ends.append((finished, self.output.exists()))
        if self.broken:
            raise RuntimeError("the tracker's own trouble")


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, list[Told]]:
    """A run with two trackers, of which the first fails whenever it is told of an end."""
    config = configuration(tmp_path)
    trackers = [Told(config.output, broken=True), Told(config.output)]
    monkeypatch.setattr("polyhead_trainer.run.optional_trackers", lambda settings: trackers)
    return config, trackers


def test_trackers_are_told_of_success_once_the_output_is_there(
    watched: tuple[RunConfig, list[Told]], caplog: pytest.LogCaptureFixture
) -> None:
    config, trackers = watched
    run_quietly(config)
    assert [tracker.ends for tracker in trackers] == [[(True, True)], [(True, True)]]
    assert "told was not told that the run has finished" in caplog.text
    assert "the tracker's own trouble" in caplog.text


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("a step", RuntimeError("a bug")),
        ("the measuring", KeyboardInterrupt()),
        ("the publication", StorageFailed("the disk is full")),
    ],
)
def test_trackers_are_told_of_every_failure(
    watched: tuple[RunConfig, list[Told]], monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    config, trackers = watched
    measure = Evaluator.measure

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    def measure_before(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(type(self), "measure", fail)
        return measure(self, *args)

    if place == "a step":
        monkeypatch.setattr(TrainingProgress, "after_step", fail)
    elif place == "the measuring":
        monkeypatch.setattr(Evaluator, "measure", measure_before)
    else:
        monkeypatch.setattr("polyhead_trainer.run.publish", fail)
    with pytest.raises(type(error)) as caught:
        run_quietly(config)
    assert caught.value is error
    assert [tracker.ends for tracker in trackers] == [[(False, False)], [(False, False)]]


def test_a_tracker_that_cannot_begin_fails_those_that_have(
    watched: tuple[RunConfig, list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (first, second) = watched
    error = ConfigError("no run can be opened")

    def begin(*args: object) -> None:
        raise error

    monkeypatch.setattr(second, "begin", begin)
    with pytest.raises(ConfigError) as caught:
        run_quietly(config)
    assert caught.value is error
    assert (first.ends, second.ends) == ([(False, False)], [])


def test_mlflows_run_that_takes_no_settings_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []

    def log_params(settings: object) -> None:
        raise OSError("refused")

    mlflow = SimpleNamespace(
        exceptions=SimpleNamespace(MlflowException=OSError),
        get_tracking_uri=lambda: "http://nowhere",
        start_run=lambda **options: SimpleNamespace(info=SimpleNamespace(run_id="1")),
        log_params=log_params,
        end_run=ends.append,
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with pytest.raises(ConfigError, match="no run can be opened at http://nowhere: refused"):
        MlflowTracker().begin("colours", {}, None)
    assert ends == ["FAILED"]


def test_settings_have_names_and_values_that_mlflow_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    mlflow = SimpleNamespace(
        exceptions=SimpleNamespace(MlflowException=OSError),
        start_run=lambda **options: SimpleNamespace(info=SimpleNamespace(run_id="1")),
        log_params=told.update,
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    settings = {"adapter.rank": "4", f"adapter.{PATTERN}": "2", "title": "x" * 1000, "n" * 1000: "1"}
    assert MlflowTracker().begin("colours", settings, None) == "1"
    assert told == {"adapter.rank": "4", f"adapter.{PATTERN_NAME}": "2", "title": "x" * 500, "n" * 250: "1"}


class WritesItsEnd(Told):
    """Stops its run by SIGTERM after the first step, and writes down what it is told then."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self, *, finished: bool) -> None:
        self.output.with_suffix(".end").write_text("finished" if finished else "failed")


def watch_with_one_that_stops_it(output: Path) -> None:
    module: Any = sys.modules["polyhead_trainer.run"]
    module.optional_trackers = lambda settings: [WritesItsEnd(output)]


def test_trackers_are_told_of_a_failure_by_sigterm(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    status = finish(tmp_path / "run.toml", prepare=watch_with_one_that_stops_it, argument=config.output)
    assert status == 128 + signal.SIGTERM
    assert config.output.with_suffix(".end").read_text() == "failed"
    assert not config.output.exists()


def test_sigterm_is_left_to_who_handles_it_already() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with unwinding_at_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="143"), unwinding_at_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("package", "override", "extra"),
    [
        ("tensorboard", "title=none", "trainer"),
        ("mlflow", "tracking.mlflow=true", "mlflow"),
        ("wandb", "tracking.wandb=true", "wandb"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, override: str, extra: str
) -> None:
    config = configuration(tmp_path, override, "backbone.source=/nowhere")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'polyhead\[{extra}\]'"):
        run_quietly(config)


def test_mlflow_has_one_run_of_an_interrupted_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    overrides = ("training.max_steps=6", "checkpoint.every_steps=2", "checkpoint.asynchronous=false")
    patterns = f"adapter.rank_pattern={{'{PATTERN}' = 2}}"
    config = configuration(tmp_path, MEASURED, "tracking.mlflow=true", patterns, *overrides)
    interrupt(monkeypatch, config, at_step=5)
    (failed,) = mlflow.search_runs(output_format="list")
    assert failed.info.status == "FAILED"
    record = run(config, Console(quiet=True), resume=True).record
    (found,) = mlflow.search_runs(output_format="list")
    assert (found.info.run_id, found.info.status) == (failed.info.run_id, "FINISHED")
    assert found.info.run_name == "colours"
    assert found.data.params["adapter.rank"] == "4"
    assert found.data.params[f"adapter.rank_pattern.{PATTERN_NAME}"] == "2"
    client = mlflow.MlflowClient()
    for name, series in expected(record, number=float).items():
        told = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}
        assert sorted(told.items()) == series, name


def test_wandb_offline_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    overrides = ("training.max_steps=6", "checkpoint.every_steps=2", "checkpoint.asynchronous=false")
    config = configuration(tmp_path, MEASURED, "tracking.wandb=true", *overrides)
    interrupt(monkeypatch, config, at_step=5)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    failed = _wandb_run(file)
    assert (failed.name, failed.settings["adapter.rank"], failed.exit_code) == ("colours", "4", 1)
    assert [step for step, _ in failed.series["train/loss"]] == [1, 2, 3, 4]
    record = run(config, Console(quiet=True), resume=True).record
    (other,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - {file}
    finished = _wandb_run(other)
    assert (finished.identity, finished.exit_code) == (failed.identity, 0)
    told = {name: dict(failed.series[name]) | dict(finished.series[name]) for name in failed.series}
    assert {name: sorted(values.items()) for name, values in told.items()} == expected(record, number=float)


@dataclasses.dataclass
class WandbRun:
    identity: str = ""
    name: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: Series = dataclasses.field(default_factory=dict)
    exit_code: int | None = None


def _wandb_run(file: Path) -> WandbRun:
    from wandb.proto import wandb_internal_pb2

    found = WandbRun()
    for data in _log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.identity, found.name = record.run.run_id, record.run.display_name
            found.settings = {one.key: json.loads(one.value_json) for one in record.run.config.update}
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "history":
            row = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
            for name, value in row.items():
                if not name.startswith("_") and name != "train/tokens_per_s":
                    found.series.setdefault(name, []).append((row["_step"], value))
    return found


def _log_records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, which wandb's offline files have after seven bytes of their own: blocks of 32 KiB with
    chunks in them, each after its checksum (4 bytes), length (2) and type (1: whole, 2 to 4: first, middle, last)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # too little for a chunk: the block is filled up
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
