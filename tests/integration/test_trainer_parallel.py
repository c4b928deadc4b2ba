"""Runs on 2 and 4 processes of this CPU (gloo): the losses and the output of one process, in less memory per rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from polyhead_core.backbone import typed_copy
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones
from polyhead_trainer.checkpoint import CheckpointDirectory
from polyhead_trainer.config import load_config
from polyhead_trainer.errors import RankFailed
from polyhead_trainer.estimate import estimate
from polyhead_trainer.export import export
from polyhead_trainer.parallel import Ranks, check_possible
from polyhead_trainer.parallel.launch import launch
from tiny import save_backbone
from trainer_processes import check_no_rank_holds_the_whole_model, curve, finish, write_run

KINDS = {"lora-float32": ("lora", "none"), "lora-int8": ("lora", "int8"), "full-float32": ("full", "none")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of one process, by kind."""
    files = {}
    for kind, (method, quantization) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        files[kind] = write_run(folder, method=method, quantization=quantization, steps=4, dropout=0.0)
        assert finish(files[kind]) == 0
    return files


def record(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "polyhead_metrics.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "strategy", "nproc"),
    [
        ("lora-float32", "fsdp", 2),
        ("lora-int8", "fsdp", 2),
        ("full-float32", "fsdp", 2),
        ("lora-int8", "ddp", 2),
        ("full-float32", "fsdp", 4),
        pytest.param("lora-float32", "ddp", 2, marks=pytest.mark.slow),
        pytest.param("full-float32", "ddp", 2, marks=pytest.mark.slow),
        pytest.param("lora-float32", "fsdp", 4, marks=pytest.mark.slow),
        pytest.param("lora-int8", "fsdp", 4, marks=pytest.mark.slow),
        pytest.param("lora-int8", "ddp", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_compute_what_one_process_does(
    tmp_path: Path, alone: dict[str, Path], kind: str, strategy: str, nproc: int
) -> None:
    file = alone[kind]
    output = tmp_path / "ranks"
    # Micro-batches of 2: 7 examples make uneven shares, and a rank without examples still takes part.
    settings = [f"output={output}", f"parallel.strategy={strategy}", "training.micro_batch_size=2"]
    launch(load_config(file, settings), nproc, overwrite=False, resume=False)
    one, several = record(file.parent / "adapters/colours"), record(output)

    # Int8 activations are rounded: where float32 sums differ in the last bit, a rounding may fall the other way. One
    # process that cuts its steps into micro-batches is as far from one that does not.
    exact_steps, later = (2, 1e-3) if kind == "lora-int8" else (4, 1e-4)
    for step, (left, right) in enumerate(zip(one["curve"], several["curve"], strict=True)):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4 if step < exact_steps else later)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4 if step < exact_steps else 1e-2)
    # Int8 roundings of all steps have added up after training: 2e-3 apart on a processor with AVX-512, less on others.
    for moment, apart in (("before", 1e-4), ("after", 3e-3 if kind == "lora-int8" else later)):
        assert several[moment]["held_out_loss"] == pytest.approx(one[moment]["held_out_loss"], rel=apart)
    name = "model.safetensors" if kind.startswith("full") else "adapter_model.safetensors"
    mine, theirs = load_file(output / name), load_file(file.parent / "adapters/colours" / name)
    assert mine.keys() == theirs.keys()
    for tensor in mine:
        # AdamW's step has the size of the learning rate, 2e-3, however small a gradient: where one is all rounding,
        # a step may differ.
        difference = (mine[tensor] - theirs[tensor]).abs()
        assert difference.max() < (2e-3 if kind == "lora-int8" else 5e-4)
        assert difference.mean() < (1e-4 if kind == "lora-int8" else 5e-6)

    held, replica = several["rank_bytes"]["held"], several["rank_bytes"]["replica"]
    print(f"{kind} {strategy} on {nproc}: " + ", ".join(f"{n} {held[n]:,} of {replica[n]:,}" for n in held))
    share = 1 if strategy == "ddp" else nproc
    for part in ("parameters", "gradients", "optimizer"):
        assert held[part] == pytest.approx(replica[part] / share, rel=0.02)
    predicted = estimate(load_config(file, settings), nproc=nproc)
    assert predicted.weights + predicted.adapter == pytest.approx(held["parameters"] + held["buffers"], rel=0.05)
    assert predicted.gradients == pytest.approx(held["gradients"], rel=0.05)
    assert predicted.optimizer == pytest.approx(held["optimizer"], rel=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks"]


@pytest.mark.parametrize("kind", ["full-float32", "lora-float32"])
def test_computing_in_bfloat16_keeps_float32_masters(tmp_path: Path, alone: dict[str, Path], kind: str) -> None:
    file = alone[kind]
    output = tmp_path / "mixed"
    dtypes = ["parallel.param_dtype=bfloat16", "parallel.reduce_dtype=float32", "parallel.output_dtype=float32"]
    launch(load_config(file, [f"output={output}", *dtypes]), 2, overwrite=False, resume=False)
    one, mixed = record(file.parent / "adapters/colours"), record(output)
    losses = [[step["loss"] for step in found["curve"]] for found in (one, mixed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4), "nothing was computed in bfloat16"
    held = one["backbone"]["num_bytes"] + (0 if kind.startswith("full") else one["trainable"]["trainable_bytes"])
    assert mixed["rank_bytes"]["held"]["parameters"] == pytest.approx(held / 2, rel=0.02)


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "polyhead_trainer", "run", str(file), *options]


def kill_a_rank_at(step: int, file: Path, *options: str) -> str:
    """Starts a run, kills one of its ranks once a checkpoint of `step` is there; returns what the run then says."""
    output = file.parent / "adapters/colours"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(file, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 100
    while step not in CheckpointDirectory(output).steps():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in family if child.ppid() != process.pid]
    ranks[-1].kill()
    killed_at = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert process.returncode == 2, errors
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert not output.exists()
    return errors


def kill_a_rank_of_launch(step: int, file: Path, nproc: int) -> RankFailed:
    """As kill_a_rank_at, of ranks that this process starts."""
    directory = CheckpointDirectory(file.parent / "adapters/colours")
    server = psutil.Process(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(launch, load_config(file), nproc, overwrite=False, resume=False)
        while step not in directory.steps():
            assert not running.done(), running.result()
            time.sleep(0.01)
        ranks = server.children()
        assert len(ranks) == nproc
        ranks[-1].kill()
        with pytest.raises(RankFailed) as told:
            running.result(timeout=30)
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    return told.value


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_ranks_do_not_outlive_the_process_that_started_them(tmp_path: Path, how: signal.Signals) -> None:
    file = write_run(tmp_path, quantization="none", steps=100_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A session of its own, so that nobody else gets the signal.
    process = subprocess.Popen(
        command(file, "--nproc", "2"), stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    checkpoints = CheckpointDirectory(tmp_path / "adapters/colours")
    deadline = time.monotonic() + 100
    while not checkpoints.steps():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in family if child.ppid() != process.pid]) == 2
    process.send_signal(how)
    process.wait(30)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        one.kill()
    assert not left


def whole_and_killed(tmp_path: Path, steps: int) -> list[Path]:
    files = [
        write_run(tmp_path / name, method="full", quantization="none", steps=steps, dropout=0.0)
        for name in ("whole", "killed")
    ]
    assert finish(files[0]) == 0
    return files


def check_same_losses(whole: Path, killed: Path) -> None:
    assert [loss for loss, _ in curve(killed)] == pytest.approx([loss for loss, _ in curve(whole)], rel=1e-3)


def test_a_rank_that_dies_stops_all_and_twice_as_many_go_on(tmp_path: Path) -> None:
    whole, killed = whole_and_killed(tmp_path, 10)
    told = kill_a_rank_of_launch(4, killed, 2).message
    assert "of 2 was killed by SIGKILL" in told
    assert "all ranks have been stopped. --resume continues after the last checkpoint" in told
    assert not (killed.parent / "adapters/colours").exists()
    check_export(killed, tmp_path)
    launch(load_config(killed), 4, overwrite=False, resume=True)
    check_same_losses(whole, killed)


def check_export(file: Path, folder: Path) -> None:
    """One process writes a model of what several had in shards, as torch reads their checkpoint."""
    exported = export(load_config(file), folder / "exported")
    dcp_to_torch_save(exported.checkpoint, folder / "state.pt")
    kept = torch.load(folder / "state.pt", weights_only=True)["trained"]
    found = load_file(exported.output / "model.safetensors")
    assert len(found) == len(kept)
    assert all(tensor.equal(kept[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_as_many_ranks_go_on_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    whole, killed = (write_run(tmp_path / name, steps=8) for name in ("whole", "killed"))
    launch(load_config(whole), 2, overwrite=False, resume=False)
    kill_a_rank_of_launch(4, killed, 2)
    launch(load_config(killed), 2, overwrite=False, resume=True)
    assert curve(killed) == curve(whole)


@pytest.mark.slow
def test_one_process_goes_on_where_four_stopped(tmp_path: Path) -> None:
    whole, killed = whole_and_killed(tmp_path, 40)
    assert "of 4 was killed by SIGKILL" in kill_a_rank_at(10, killed, "--nproc", "4")
    assert finish(killed, resume=True) == 0
    check_same_losses(whole, killed)


@pytest.mark.slow
def test_torchrun_starts_ranks_too(tmp_path: Path, alone: dict[str, Path]) -> None:
    file = alone["lora-float32"]
    output = tmp_path / "ranks"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "polyhead_trainer", "run", str(file), "--set", f"output={output}"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("measuring the tuned model") == 1, "only the main rank prints"
    losses = [[step["loss"] for step in record(found)["curve"]] for found in (file.parent / "adapters/colours", output)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_users_mistake_on_ranks_is_the_same_error(alone: dict[str, Path]) -> None:
    config = load_config(alone["lora-int8"], ["output=never", "parallel.wrap=LamaDecoderLayer"])
    with pytest.raises(ConfigError, match=r"parallel.wrap = LamaDecoderLayer: .*LlamaDecoderLayer"):
        launch(config, 2, overwrite=False, resume=False)


def test_what_cannot_be_sharded_is_refused_by_name(alone: dict[str, Path]) -> None:
    config = load_config(alone["lora-int8"], ["backbone.quantization=llm.int8"])
    with pytest.raises(ConfigError, match=r"llm.int8: .* set backbone.quantization = int8"):
        check_possible(config, Ranks(size=2))
    check_possible(config, Ranks())
    offload = load_config(alone["lora-int8"], ["parallel.cpu_offload=true"])
    with pytest.raises(ConfigError, match="cpu_offload"):
        check_possible(offload, Ranks(size=2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_no_rank_ever_holds_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    """Nor does it copy one that is stored in another type than it computes in."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = save_backbone("llama", tmp_path / "backbone", **shape) / "model.safetensors"
    whole = model.stat().st_size
    AutoModelForCausalLM.from_pretrained(model.parent, dtype=stored).save_pretrained(model.parent)
    file = write_run(tmp_path, quantization="none")
    if stored != torch.float32:
        monkeypatch.setattr(typed_copy, "FILE_BYTES", 4 << 20)
        config = load_config(file)
        backbones.load(backbones.on_host(config.backbone), shared=True)
        copies = list((tmp_path / "cache/typed").glob("*/*.safetensors"))
        assert len(copies) > 4
        assert max(copy.stat().st_size for copy in copies) < 10 << 20
    check_no_rank_holds_the_whole_model(file, whole)
