"""`trainer export`: a checkpoint as the run would have published it, whoever wrote it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from polyhead_core.errors import AdapterMismatch, ConfigError, PolyheadError
from polyhead_trainer import run as run_module
from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.cli import app
from polyhead_trainer.config import RunConfig, load_config
from polyhead_trainer.errors import ResumeRefused, StorageFailed
from polyhead_trainer.export import export
from tiny import save_backbone
from trainer_processes import write_run


def unfinished(file: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunConfig:
    """A run whose last step has a checkpoint, and whose output could not be written."""

    def fail(*_: Any, **__: Any) -> str:
        raise ConfigError("no room for the output")

    config = load_config(file, ["checkpoint.every_steps=2", "checkpoint.keep=3", *overrides])
    published = run_module.publish
    monkeypatch.setattr(run_module, "publish", fail)
    with pytest.raises(ConfigError, match="no room"):
        run_module.run(config, Console(quiet=True))
    monkeypatch.setattr(run_module, "publish", published)
    return config


def tensors(directory: Path) -> dict[str, Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("method", "quantization"), [("lora", "int8"), ("full", "none")])
def test_the_last_checkpoint_is_what_the_run_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, quantization: str
) -> None:
    file = write_run(tmp_path, method=method, quantization=quantization, steps=4)
    config = unfinished(file, monkeypatch)
    exported = export(config, tmp_path / "exported")
    assert (exported.step, exported.is_adapter) == (4, method == "lora")
    earlier = export(config, tmp_path / "earlier", step=2)
    with pytest.raises(PolyheadError, match="choose another"):
        export(config, tmp_path / "exported")
    with pytest.raises(ConfigError, match="has those after steps 2, 4"):
        export(config, tmp_path / "none", step=3)

    other = save_backbone("llama", tmp_path / "other", seed=1)
    with pytest.raises(AdapterMismatch, match="name the right backbone"):
        export(load_config(file, [f"backbone.source={other}"]), tmp_path / "none")

    run_module.run(config, Console(quiet=True), resume=True)
    published, found, before = (tensors(path) for path in (config.output, exported.output, earlier.output))
    assert found.keys() == published.keys() == before.keys()
    assert all(found[name].equal(published[name]) for name in published)
    assert any(not before[name].equal(published[name]) for name in published)
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        export(config, tmp_path / "none")


def test_by_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, steps=2)
    config = unfinished(file, monkeypatch)
    done = CliRunner().invoke(app, ["export", str(file), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"an adapter, after step 2, from {CheckpointDirectory(config.output).at(2)}" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=2", "adapter.rank was 4, is 2"),
        ('adapter.target_modules=["q_proj"]', r'adapter.target_modules was "all-linear", is \["q_proj"\]'),
        ("adapter.alpha=99", "adapter.alpha was 16, is 99"),
        ("adapter={method = 'ia3'}", 'adapter.method was "lora", is "ia3"'),
        ("backbone.quantization=none", 'backbone.quantization was "int8", is "none"'),
    ],
)
def test_settings_of_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    """Some would load without an error, and make something else of the tensors."""
    file = write_run(tmp_path, steps=2)
    unfinished(file, monkeypatch)
    with pytest.raises(ResumeRefused, match=f"holds another model: .*{said}"):
        export(load_config(file, [override]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(load_config(file, ["training.learning_rate=1", "training.max_steps=99"]), tmp_path / "out")


def test_a_damaged_checkpoint_and_an_output_without_a_place_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_run(tmp_path, steps=4)
    config = unfinished(file, monkeypatch)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageFailed, match=r"cannot write .*file/out: .*step-4 stays as it is"):
        export(config, tmp_path / "file" / "out")
    last = CheckpointDirectory(config.output).at(4)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:500]), Path.unlink):
        damage(next(last.glob("*.distcp")))
        for use in (lambda: export(config, tmp_path / "out"), lambda: resume(config)):
            with pytest.raises(ResumeRefused, match=r"step-4 cannot be read: .*delete it, and the one before it"):
                use()
    (last / ".metadata").unlink()
    with pytest.raises(ResumeRefused, match=r"step-4 cannot be read: .metadata is missing"):
        resume(config)
    shutil.rmtree(last)
    assert len(resume(config).record.curve) == 4


def resume(config: RunConfig) -> run_module.RunResult:
    return run_module.run(config, Console(quiet=True), resume=True)
