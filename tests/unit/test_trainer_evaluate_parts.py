"""Measuring: on the device that the model computes on, in batches of the size that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_trainer_loop import EXAMPLES, PAD, tiny_lora
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones
from polyhead_trainer.config import BackboneSection, EvaluateSection
from polyhead_trainer.evaluate import Evaluator, compute_device, prepare

GPU = torch.device("cuda")


def test_shards_in_host_memory_are_computed_with_where_they_are_gathered() -> None:
    model = nn.Linear(4, 2, bias=False)
    assert compute_device(model) == torch.device("cpu")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
        # As FSDP holds it with parallel.cpu_offload: the shard on the host, its mesh of GPUs.
        spec = DTensor.from_local(torch.zeros(2, 4), DeviceMesh("cpu", [0]), [Shard(0)])._spec
        spec.mesh = mesh
        shard = DTensor(torch.zeros(2, 4), spec, requires_grad=False)
        model.weight = nn.Parameter(shard)
        assert model.weight.to_local().device.type == "cpu"
        assert compute_device(model) == GPU
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("num_gpus", "name", "cure"), [(0, "cuda", "cpu"), (1, "cuda:1", "cuda"), (0, "cuda:0", "cpu")]
)
def test_a_gpu_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, name: str, cure: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    here = "1 GPUs, numbered from 0" if num_gpus else "no GPU that this PyTorch can use"
    settings = BackboneSection(source=str(tmp_path), device=name)
    with pytest.raises(
        ConfigError, match=f"backbone.device = {name}: here is {here} .*set backbone.device = {cure}, or"
    ):
        backbones.load(settings)


def test_batches_are_as_large_as_the_setting_and_change_nothing_else(tmp_path: Path) -> None:
    model = tiny_lora(tmp_path, quantization="none").model

    def evaluator(size: int) -> Evaluator:
        return prepare(EvaluateSection(max_new_tokens=3, batch_size=size), EXAMPLES, tiny.tokenizer(), PAD)

    rows: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    measured = evaluator(4).measure(model)
    handle.remove()
    assert max(rows) == 4
    whole = evaluator(32).measure(model)
    assert measured.held_out_loss == pytest.approx(whole.held_out_loss, rel=1e-5)
    assert measured.answers == whole.answers
