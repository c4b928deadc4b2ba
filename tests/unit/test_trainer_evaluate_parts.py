"""Measuring: on the device that the model computes on, in batches of the size that the settings name."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer_loop import EXAMPLES, PAD, made, tiny_lora
from test_trainer_memory_savers import peak_allocated, tuned_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import tiny
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones, data
from polyhead_trainer.batching import Batch, collate, pack
from polyhead_trainer.config import (
    AdapterSettings,
    BackboneSection,
    EvaluateSection,
    LoraSettings,
    PromptSettings,
    RunConfig,
)
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.evaluate import Evaluator, compute_device, prepare
from polyhead_trainer.objectives.chunked_loss import over_label_logits
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.tasks.completion import completion

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


ADAPTERS: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4),
    "head": LoraSettings(rank=4, target_modules=["q_proj", "lm_head"]),
    "prompts": PromptSettings(method="prompt_tuning", num_virtual_tokens=3),
}


def random_model(folder: Path, adapter: str = "lora", **how: Any) -> nn.Module:
    return tuned_model(folder, adapter=ADAPTERS[adapter], **how).eval()


def answered(text: str, answer: str) -> EncodedExample:
    return data.encode(Example(origin=text, prompt=text, completion=answer), tiny.tokenizer())


def task_evaluator(folder: Path, logit_chunk: int, **more: Any) -> Evaluator:
    """As a run with this training.logit_chunk measures: right choices, general text and an earlier task included."""
    (folder / "general.txt").write_text("What is written here is general enough. " * 4)
    (folder / "earlier.jsonl").write_text('{"prompt": "What was before?", "completion": "Another task."}\n')
    examples = [
        answered(f"{text} " * (1 + count % 7), "xyz"[count % 3]) for count, text in enumerate(ascii_letters[:24])
    ]
    config = RunConfig.model_validate(
        {
            "output": folder / "output",
            "data": {"train": ["none"], "held_out": ["none"]},
            "training": {"max_steps": 1, "logit_chunk": logit_chunk},
            "evaluate": {
                "choices": ["x", "y", "z"],
                "general_text": folder / "general.txt",
                "earlier": [str(folder / "earlier.jsonl")],
                "max_new_tokens": 2,
                "batch_size": 5,
                **more,
            },
        }
    )
    backbone: Any = SimpleNamespace(tokenizer=tiny.tokenizer())
    return completion(config, backbone).evaluator(examples)


def by_rows(model: nn.Module, batch: Batch, limit: int) -> list[tuple[slice, Tensor]]:
    with torch.no_grad():
        return over_label_logits(model, batch, limit, lambda logits_CV, rows: (rows, logits_CV))


def masked(seed: int) -> list[EncodedExample]:
    """Labels here and there, as in a conversation with several answers; one in each example at least."""
    draw = random.Random(seed)
    return [
        replace(item, is_label=[False, True, *(draw.random() < 0.4 for _ in item.token_ids[2:])])
        for item in made([(draw.randint(1, 9), draw.randint(1, 12)) for _ in range(5)])
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "adapter"), [("llama", "lora"), ("llama-untied", "head"), ("gpt_neox", "lora")])
def test_parts_of_the_label_logits_are_all_of_them(tmp_path: Path, kind: str, adapter: str, packed: bool) -> None:
    model = random_model(tmp_path, adapter, kind=kind)
    if packed:
        prepare_packing(model, EXAMPLES, PAD)
    for seed in range(4):
        batch = pack(masked(seed)) if packed else collate(masked(seed), PAD)
        ((whole, plain_NV),) = by_rows(model, batch, limit=0)
        assert whole == slice(0, batch.num_labels)
        parts = by_rows(model, batch, limit=3 * tiny.VOCAB + 1)
        assert [len(logits_CV) for _, logits_CV in parts[:-1]] == [3] * (len(parts) - 1)
        assert [row for rows, _ in parts for row in range(batch.num_labels)[rows]] == list(range(batch.num_labels))
        torch.testing.assert_close(torch.cat([logits for _, logits in parts]), plain_NV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "quantization"), [("lora", "none"), ("head", "int8"), ("prompts", "none"), ("lora", "int8")]
)
def test_measures_are_the_same_in_chunks(tmp_path: Path, adapter: str, quantization: str) -> None:
    model = random_model(tmp_path, adapter, quantization=quantization)
    plain = task_evaluator(tmp_path, 0).measure(model)
    assert plain.general_perplexity is not None
    assert plain.choice_accuracy is not None
    assert 0 < plain.choice_accuracy < 1
    # 5: less than a row has.
    for limit in (5, 4 * tiny.VOCAB, 7 * tiny.VOCAB):
        chunked = task_evaluator(tmp_path, limit).measure(model)
        assert chunked.held_out_loss == pytest.approx(plain.held_out_loss, rel=1e-5)
        assert chunked.earlier_loss == pytest.approx(plain.earlier_loss, rel=1e-5)
        assert chunked.general_perplexity == pytest.approx(plain.general_perplexity, rel=1e-5)
        assert (chunked.choice_accuracy, chunked.answers) == (plain.choice_accuracy, plain.answers)
    unlimited = task_evaluator(tmp_path, 10**9).measure(model)
    assert unlimited == plain, "where all fit, it is the very computation"


def test_full_logits_are_never_held_while_measuring(tmp_path: Path) -> None:
    """Some 150 label tokens in a batch of each of three measures, over 32,768 tokens: 20 MB of logits."""
    vocabulary, full = 32768, 150 * 32768 * 4
    model = random_model(tmp_path, vocab_size=vocabulary)
    rows: list[int] = []
    handle = model.get_base_model().lm_head.register_forward_hook(
        lambda *given: rows.append(given[2].numel() // vocabulary)
    )

    def peak(logit_chunk: int) -> int:
        rows.clear()
        evaluator = task_evaluator(tmp_path, logit_chunk, choices=[], general_tokens=160, generate_examples=0)
        evaluator = replace(evaluator, held_out=made([(2, 30)] * 10), earlier=made([(2, 30)] * 10))
        return peak_allocated(lambda: evaluator.measure(model))

    plain_peak = peak(0)
    assert sorted(rows) == [150, 150, 150, 150, 159]
    chunked_peak = peak(16 * vocabulary)
    assert max(rows) == 16
    handle.remove()
    print(f"peak {plain_peak:,} bytes with full logits of {full:,}, {chunked_peak:,} in chunks")
    assert plain_peak > 2 * full
    assert chunked_peak < 0.3 * full
