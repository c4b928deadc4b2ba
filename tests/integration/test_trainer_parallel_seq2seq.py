"""Encoder-decoders on 2 processes of this CPU (gloo): the losses of one process, and no rank with the whole model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer_parallel_methods import check_ranks_do_as_one, record
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForSeq2SeqLM

from encoder_decoders import CONFIGS, save_encoder_decoder
from polyhead_core.backbone import Backbone, typed_copy
from polyhead_trainer import backbones, methods
from polyhead_trainer.config import BackboneSection, LoraSettings, ParallelSection
from polyhead_trainer.parallel import Ranks
from polyhead_trainer.parallel.apply import _shard, layers_to_shard
from trainer_processes import check_no_rank_holds_the_whole_model, write_run

SGD = ("training.optimizer=sgd", "training.learning_rate=0.05", "training.schedule=constant")
"""AdamW makes whole steps of gradients that are all rounding, as those of BART's key biases are."""


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_seq2seq_run(folder: Path, kind: str, stored: torch.dtype, *, method: str = "lora", **changes: int) -> Path:
    save_encoder_decoder(folder / "backbone", kind, stored=stored, **changes)
    file = write_run(folder, method=method, quantization="none", steps=3, dropout=0.0)
    file.write_text('task = "seq2seq"\n' + file.read_text())
    return file


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("mt5", torch.float32),
        ("bart", torch.bfloat16),
        pytest.param("t5-own-head", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_compute_what_one_process_does(tmp_path: Path, kind: str, stored: torch.dtype, method: str) -> None:
    file = write_seq2seq_run(tmp_path, kind, stored, method=method)
    # A dozen logits' rows at a time: both halves of the model are then called beside its own forward.
    chunked = "training.logit_chunk=3456" if method == "full" else "training.logit_chunk=0"
    found = check_ranks_do_as_one(file, *SGD, chunked, "training.micro_batch_size=2")
    held, replica = found["rank_bytes"]["held"], found["rank_bytes"]["replica"]
    for part in ("parameters", "gradients"):
        assert held[part] == pytest.approx(replica[part] / 2, rel=0.02)
    losses = [step["loss"] for step in found["curve"]]
    assert losses[-1] < losses[0], "nothing was learned, or this shows nothing"
    if method == "full":
        outputs = [tmp_path / "adapters" / name for name in ("colours", "ranks")]
        configs = [json.loads((output / "config.json").read_text()) for output in outputs]
        assert configs[1] == configs[0]
    assert (
        record(tmp_path / "adapters/ranks")["after"]["answers"]
        == record(tmp_path / "adapters/colours")["after"]["answers"]
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shared_model_is_the_one_that_a_process_alone_loads(tmp_path: Path, kind: str, stored: torch.dtype) -> None:
    directory = save_encoder_decoder(tmp_path / "backbone", kind, stored=stored)
    make_old_fashioned(directory)
    settings = BackboneSection(source=str(directory), quantization="none", cache_dir=tmp_path / "cache")
    alone, shared = backbones.load(settings), backbones.load(settings, shared=True)
    assert (tmp_path / "cache/typed").exists() == (stored != torch.float32)

    one, other = alone.model.state_dict(), shared.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    buffers = dict(shared.model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in alone.model.named_buffers())
    assert tied(shared) == tied(alone)
    assert ("lm_head.weight" in dict(shared.model.named_parameters())) == (kind == "t5-own-head")
    assert shared.model.generation_config.to_dict() == alone.model.generation_config.to_dict()
    assert shared.model.generation_config.num_beams == 3
    assert shared.fingerprint == alone.fingerprint
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits for model in (alone.model, shared.model)]
    assert torch.equal(*logits)


def make_old_fashioned(directory: Path) -> None:
    """Generation settings in the model's own configuration, where BART's were for years."""
    (directory / "generation_config.json").unlink()
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 3}))


def tied(backbone: Backbone) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in backbone.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values()}


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_of_both_stacks_is_gathered_by_itself(tmp_path: Path, kind: str) -> None:
    directory = save_encoder_decoder(tmp_path / "backbone", kind)
    backbone = backbones.load(BackboneSection(source=str(directory), quantization="none"), shared=True)
    model = methods.tune(backbone, LoraSettings(rank=4), seed=0).model
    layers = layers_to_shard(model)
    assert len(layers) == 4
    assert {name.rpartition(".")[0].split(".")[-2] for name, module in model.named_modules() if module in layers} == {
        "encoder",
        "decoder",
    }
    _shard(model, ParallelSection(), Ranks())
    assert [module for module in model.modules() if isinstance(module, FSDPModule)] == [model, *layers]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "stored"), [("t5", torch.bfloat16), ("bart", torch.bfloat16), ("bart", torch.float32)], ids=str
)
def test_no_rank_ever_holds_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stored: torch.dtype
) -> None:
    """Nor does it copy one that is stored in another type than it computes in."""
    shape = (
        {"d_ff": 2048, "num_layers": 5, "num_decoder_layers": 5}
        if kind == "t5"
        else {"encoder_layers": 5, "decoder_layers": 5, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
    )
    file = write_seq2seq_run(tmp_path, kind, stored, d_model=512, **shape)
    with torch.device("meta"):
        config = backbones.AutoConfig.from_pretrained(tmp_path / "backbone")
        whole = sum(one.nbytes for one in AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).parameters())
    monkeypatch.setattr(typed_copy, "FILE_BYTES", 4 << 20)
    settings = BackboneSection(source=str(tmp_path / "backbone"), quantization="none", cache_dir=tmp_path / "cache")
    backbones.load(backbones.on_host(settings), shared=True)  # as the first rank does before the others
    check_no_rank_holds_the_whole_model(file, whole)
