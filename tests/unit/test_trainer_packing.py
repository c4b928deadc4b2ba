"""Packed examples compute what they do alone, and nothing of their neighbours; what cannot be packed is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.batching import collate, pack
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.loop import StepReport, TrainingLoop, accumulate_gradients
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.objectives.label_logits import label_logits
from polyhead_trainer.packing import QUICKER_IN_FLOAT32, packed_attention, prepare_packing
from tiny import CONFIGS, TARGETS, VOCAB, reference_model, save_backbone

PAD = 2


def made(lengths: list[tuple[int, int]]) -> list[EncodedExample]:
    """Examples of (prompt, completion) tokens with arbitrary ids."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for prompt, completion in lengths:
        ids = torch.randint(4, 280, (prompt + completion,), generator=generator).tolist()
        labels = [False] * prompt + [True] * completion
        example = Example(origin=f"made:{len(examples) + 1}")
        examples.append(EncodedExample(example=example, token_ids=ids, is_label=labels, prompt_length=prompt))
    return examples


# The fourth is longer than the sliding window of the tiny mistral.
EXAMPLES = made([(5, 1), (3, 9), (1, 12), (31, 5), (6, 3)])
assert max(map(len, EXAMPLES)) > CONFIGS["mistral"].sliding_window


def tiny_model(tmp_path: Path, kind: str) -> PreTrainedModel:
    return reference_model(save_backbone(kind, tmp_path / kind))


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def losses(model: nn.Module, examples: list[EncodedExample]) -> list[Tensor]:
    batch = pack(examples)
    each = F.cross_entropy(label_logits(model, batch), batch.targets_N, reduction="none")
    return list(each.split([example.num_labels for example in examples]))


def test_packed_attention_in_bfloat16_is_as_exact_as_its_type_forward_and_backward() -> None:
    lengths = [1, 5, 64, QUICKER_IN_FLOAT32 + 8]
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = torch.randn(4, 1, 4, sum(lengths), 16, generator=generator).bfloat16()
    inputs = [query, key[:, :2], value[:, :2]]

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = [one.to(dtype).requires_grad_() for one in inputs]
        out, _ = packed_attention(nn.Module(), *given, None, example_lengths=lengths)
        return [out, *torch.autograd.grad(out, given, gradient.to(dtype).transpose(1, 2))]

    for found, exact in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() <= 0.01 * exact.norm()


def test_a_packed_row_learns_each_example_as_if_alone() -> None:
    batch = pack(EXAMPLES)
    assert batch.token_ids_BT.tolist() == [[token for example in EXAMPLES for token in example.token_ids]]
    assert batch.num_tokens == batch.token_ids_BT.numel() == sum(map(len, EXAMPLES))
    assert batch.targets_N.tolist() == [
        token for example in EXAMPLES for token, label in zip(example.token_ids, example.is_label, strict=True) if label
    ]
    start = 0
    for example in EXAMPLES:
        end = start + len(example)
        assert batch.predicts_BT[0, start : end - 1].tolist() == example.is_label[1:]
        assert not batch.predicts_BT[0, end - 1], "an example's last token must not predict the next example's first"
        start = end


@pytest.mark.parametrize("kind", [*CONFIGS, "gpt2"])
@torch.no_grad()
def test_packed_label_logits_are_those_of_each_example_alone(tmp_path: Path, kind: str) -> None:
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    model = random_model(gpt2) if kind == "gpt2" else tiny_model(tmp_path, kind)
    # Before the model is prepared, so that the slow side is transformers as it comes.
    alone = [model(torch.tensor([example.token_ids])).logits[0, example.prompt_length - 1 : -1] for example in EXAMPLES]
    padded = label_logits(model, collate(EXAMPLES, PAD))
    prepare_packing(model, EXAMPLES, PAD)
    torch.testing.assert_close(label_logits(model, pack(EXAMPLES)), torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert torch.equal(label_logits(model, collate(EXAMPLES, PAD)), padded), "padded batches are what they were"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma", "gpt_neox", "phi"])
@torch.no_grad()
def test_other_tokens_in_a_neighbour_change_no_bit_of_the_others(tmp_path: Path, kind: str) -> None:
    model = tiny_model(tmp_path, kind)
    prepare_packing(model, EXAMPLES, PAD)
    before = losses(model, EXAMPLES)
    for changed in range(len(EXAMPLES)):
        other = replace(EXAMPLES[changed], token_ids=[4 + token % 100 for token in EXAMPLES[changed].token_ids])
        after = losses(model, [*EXAMPLES[:changed], other, *EXAMPLES[changed + 1 :]])
        for index, (one, two) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(one, two) == (index != changed)


@pytest.mark.parametrize(
    ("kind", "quantization"), [("llama", "none"), ("llama", "int8"), ("phi", "none"), ("gpt_neox", "none")]
)
@pytest.mark.parametrize("micro_batch_size", [2, 5])
def test_packed_gradients_are_the_padded_ones(
    tmp_path: Path, kind: str, quantization: str, micro_batch_size: int
) -> None:
    directory = save_backbone(kind, tmp_path / kind)
    backbone = load_backbone(str(directory), quantization=quantization, cache_dir=tmp_path / "cache", calibrate=False)
    model = methods.tune(backbone, LoraSettings(rank=4, target_modules=TARGETS[kind]), seed=0).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    padded_loss = accumulate_gradients(model, CompletionObjective(PAD), EXAMPLES, len(EXAMPLES))
    padded = take_gradients(model)
    prepare_packing(model, EXAMPLES, PAD)
    packed_loss = accumulate_gradients(model, CompletionObjective(PAD, packing=True), EXAMPLES, micro_batch_size)
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    for one, other in zip(take_gradients(model), padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def take_gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in found)
    model.zero_grad()
    return found


def test_examples_stay_apart_when_activations_are_recomputed(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama").train()
    prepare_packing(model, EXAMPLES, PAD)
    objective = CompletionObjective(PAD, packing=True)
    accumulate_gradients(model, objective, EXAMPLES, len(EXAMPLES))
    kept = take_gradients(model)
    model.gradient_checkpointing_enable()
    accumulate_gradients(model, objective, EXAMPLES, len(EXAMPLES))
    for one, other in zip(take_gradients(model), kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_int8_with_bfloat16_activations_is_packed_as_exactly_as_it_rounds(tmp_path: Path, kind: str) -> None:
    directory = save_backbone(kind, tmp_path / kind)
    backbone = load_backbone(
        str(directory), quantization="int8", dtype="bfloat16", cache_dir=tmp_path / "cache", calibrate=False
    )
    model = methods.tune(backbone, LoraSettings(rank=4, target_modules=TARGETS[kind]), seed=0).model
    padded = accumulate_gradients(model, CompletionObjective(PAD), EXAMPLES, len(EXAMPLES))
    prepare_packing(model, EXAMPLES, PAD)
    packed = accumulate_gradients(model, CompletionObjective(PAD, packing=True), EXAMPLES, len(EXAMPLES))
    assert packed == pytest.approx(padded, rel=0.02)


def test_a_run_with_packing_learns_as_one_without(tmp_path: Path) -> None:
    curves = []
    for packing in (False, True):
        backbone = load_backbone(
            str(save_backbone("llama", tmp_path / str(packing))), quantization="none", cache_dir=tmp_path / "cache"
        )
        tuned = methods.tune(backbone, LoraSettings(rank=4), seed=0)
        if packing:
            prepare_packing(tuned.model, EXAMPLES, PAD)
        settings = TrainingSection(max_steps=6, batch_size=3, learning_rate=1e-2)
        reports: list[StepReport] = []
        TrainingLoop(tuned, CompletionObjective(PAD, packing=packing), EXAMPLES, settings).run([Keep(reports)])
        curves.append([report.loss for report in reports])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


class Keep:
    def __init__(self, reports: list[StepReport]) -> None:
        self.reports = reports

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self.reports.append(report)


_SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
UNPACKABLE = {
    "own attention": FalconConfig(**_SHAPE),
    "position bias of the whole row": BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4),
    "convolution over neighbours": Lfm2Config(
        **_SHAPE, num_key_value_heads=2, intermediate_size=96, layer_types=["conv", "full_attention"]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", UNPACKABLE)
@torch.no_grad()
def test_backbones_that_would_leak_are_refused_and_left_as_they_were(kind: str, dtype: torch.dtype) -> None:
    config = UNPACKABLE[kind]
    model = random_model(config).to(dtype)
    before = label_logits(model, collate(EXAMPLES, PAD))
    with pytest.raises(ConfigError, match=f"cannot be used with {config.model_type}: .*packing = false"):
        prepare_packing(model, EXAMPLES, PAD)
    assert torch.equal(label_logits(model, collate(EXAMPLES, PAD)), before)


@torch.no_grad()
def test_a_deep_model_that_magnifies_rounding_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its padded logits differ from separate ones as much."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=80, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.3,
    )  # fmt: skip
    prepare_packing(random_model(config).to(torch.bfloat16), EXAMPLES, PAD)
    monkeypatch.setattr("polyhead_trainer.packing.SAME_NOISE", 0)
    with pytest.raises(ConfigError, match="packed, two examples give other logits than apart"):
        prepare_packing(random_model(config).to(torch.bfloat16), EXAMPLES, PAD)


def test_methods_with_virtual_tokens_are_refused_by_name(tmp_path: Path) -> None:
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_model(tmp_path, "llama"), settings)
    with pytest.raises(ConfigError, match="PREFIX_TUNING puts its virtual tokens before a row"):
        prepare_packing(model, EXAMPLES, PAD)


def test_a_model_in_training_stays_in_training(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(tmp_path, "llama"), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)).train()
    prepare_packing(model, EXAMPLES, PAD)
    assert model.training


def test_attention_of_another_form_is_not_computed_as_softmax() -> None:
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(nn.Module(), query, query, query, None, example_lengths=[2, 2], softcap=50.0)
