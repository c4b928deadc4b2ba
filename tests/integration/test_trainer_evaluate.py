"""`trainer evaluate` finds what `trainer run` measured, from the adapter alone and from its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer_run import configuration, run_quietly
from typer.testing import CliRunner

from polyhead_core.adapter_directory import stamp_backbone
from polyhead_core.errors import AdapterMismatch, ConfigError
from polyhead_trainer.cli import app
from polyhead_trainer.inspection import inspect_adapter
from polyhead_trainer.merge import merge
from polyhead_trainer.reevaluate import measure, read_subject


def test_evaluate_finds_what_the_run_measured(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    result = run_quietly(config)
    for subject in (config.output, tmp_path / "run.toml"):
        again = measure(read_subject(subject, []))
        assert (again.before, again.after) == (result.record.before, result.record.after)
        assert again.content_hash == result.content_hash
    printed = CliRunner().invoke(app, ["evaluate", str(config.output), "--json", "--set", "evaluate.max_examples=2"])
    (one,) = json.loads(printed.stdout)
    assert one["content_hash"] == result.content_hash
    assert one["after"]["held_out_loss"] != result.record.after.held_out_loss
    assert one["after"]["general_perplexity"] == result.record.after.general_perplexity


def test_inspect_and_merge_take_a_runs_adapter(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    result = run_quietly(config)
    facts = inspect_adapter(config.output)
    assert facts.metrics is not None
    assert facts.metrics.after["held_out_loss"] == result.record.after.held_out_loss
    assert (facts.backbone_fingerprint, facts.quantization) == (result.record.backbone.fingerprint, "int8")
    merged = merge(config.output, tmp_path / "merged", cache_dir=tmp_path / "cache")
    assert merged.trained_on == "int8"
    plain, changed = (load_file(tmp_path / name / "model.safetensors") for name in ("backbone", "merged"))
    moved = {name for name in plain if not plain[name].equal(changed[name])}
    assert moved == {name for name in plain if "_proj" in name}


def test_what_cannot_be_evaluated_says_why(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    run_quietly(config)
    stamp_backbone(config.output, fingerprint="0" * 64, quantization="int8")
    with pytest.raises(AdapterMismatch, match="with fingerprint 0000"):
        measure(read_subject(config.output, []))
    (config.output / "polyhead_metrics.json").unlink()
    with pytest.raises(ConfigError, match="give the run's configuration"):
        read_subject(config.output, [])
