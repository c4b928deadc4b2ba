"""The loop on tiny models: exact accumulation, exact loss, the schedule, a stop at the first loss that is no number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyhead_core.backbone import load_backbone
from polyhead_trainer import methods
from polyhead_trainer.batching import collate
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.loop import StepReport, TrainingLoop, accumulate_gradients
from polyhead_trainer.methods import Tuned
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.objectives.label_logits import first_label_rows, label_logits
from polyhead_trainer.schedule import learning_rate_factor
from tiny import save_backbone

PAD = 2
OBJECTIVE = CompletionObjective(PAD)


@dataclass
class Keep:
    reports: list[StepReport]

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self.reports.append(report)


def made(lengths: list[tuple[int, int]]) -> list[EncodedExample]:
    """Examples of (prompt, completion) tokens with arbitrary ids."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for prompt, completion in lengths:
        ids = torch.randint(4, 280, (prompt + completion,), generator=generator).tolist()
        labels = [False] * prompt + [True] * completion
        examples.append(
            EncodedExample(
                example=Example(origin=f"made:{len(examples) + 1}"),
                token_ids=ids,
                is_label=labels,
                prompt_length=prompt,
            )
        )
    return examples


EXAMPLES = made([(5, 1), (3, 9), (8, 2), (4, 4), (1, 12), (6, 3)])


def tiny_lora(tmp_path: Path, quantization: str = "int8", kind: str = "llama") -> Tuned:
    directory = save_backbone(kind, tmp_path / kind)
    backbone = load_backbone(str(directory), quantization=quantization, cache_dir=tmp_path / "cache", calibrate=False)
    return methods.tune(backbone, LoraSettings(rank=4), seed=0)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_add_up_to_the_large_batch(tmp_path: Path, quantization: str, micro_batch_size: int) -> None:
    model = tiny_lora(tmp_path, quantization).model
    large_loss = accumulate_gradients(model, OBJECTIVE, EXAMPLES, len(EXAMPLES))
    large = gradients(model)
    small_loss = accumulate_gradients(model, OBJECTIVE, EXAMPLES, micro_batch_size)
    assert small_loss == pytest.approx(large_loss, rel=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in large)
    for one, other in zip(gradients(model), large, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt_neox", "phi"])
def test_label_logits_are_the_models_own_whatever_the_padding(tmp_path: Path, kind: str) -> None:
    model = tiny_lora(tmp_path, "none", kind).model
    batch = collate(EXAMPLES, PAD)
    with torch.no_grad():
        rows = label_logits(model, batch)
        at = 0
        for example, first in zip(EXAMPLES, first_label_rows(batch).tolist(), strict=True):
            assert first == at
            alone = model(torch.tensor([example.token_ids])).logits[0, example.prompt_length - 1 : -1]
            torch.testing.assert_close(rows[at : at + example.num_labels], alone, rtol=1e-3, atol=1e-3)
            targets = batch.targets_N[at : at + example.num_labels]
            assert targets.tolist() == example.token_ids[example.prompt_length :]
            at += example.num_labels
    assert at == len(rows)


def test_training_lowers_the_loss_and_moves_the_adapter_alone(tmp_path: Path) -> None:
    tuned = tiny_lora(tmp_path)
    model = tuned.model
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    reports: list[StepReport] = []
    settings = TrainingSection(max_steps=12, batch_size=6, learning_rate=1e-2)
    TrainingLoop(tuned, OBJECTIVE, EXAMPLES, settings).run([Keep(reports)])
    assert [report.step for report in reports] == list(range(1, 13))
    assert reports[-1].loss < 0.8 * reports[0].loss
    assert reports[0].num_labels == sum(example.num_labels for example in EXAMPLES)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name


def test_the_reported_loss_is_the_mean_over_label_tokens(tmp_path: Path) -> None:
    model = tiny_lora(tmp_path, "none").model
    total = 0.0
    with torch.no_grad():
        for example in EXAMPLES:
            logits = model(torch.tensor([example.token_ids])).logits[0, example.prompt_length - 1 : -1]
            targets = torch.tensor(example.token_ids[example.prompt_length :])
            total += F.cross_entropy(logits, targets, reduction="sum").item()
    expected = total / sum(example.num_labels for example in EXAMPLES)
    assert accumulate_gradients(model, OBJECTIVE, EXAMPLES, 2) == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_no_number_stops_and_names_the_examples(tmp_path: Path) -> None:
    tuned = tiny_lora(tmp_path, "none")
    with torch.no_grad():
        tuned.model.get_input_embeddings().weight[EXAMPLES[1].token_ids[0]] = math.nan
    settings = TrainingSection(max_steps=2, batch_size=6)
    with pytest.raises(TrainingDiverged, match=r"step 1: .*made:2"):
        TrainingLoop(tuned, OBJECTIVE, EXAMPLES, settings).run([])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_falls(schedule: str) -> None:
    settings = TrainingSection.model_validate({"max_steps": 100, "schedule": schedule, "warmup": 0.1})
    rates = [learning_rate_factor(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] > 0
    assert (rates[-1] < 0.02) == (schedule != "constant")


def test_all_linear_leaves_the_head_alone_and_layers_choose(tmp_path: Path) -> None:
    directory = save_backbone("llama-untied", tmp_path / "model")
    backbone = load_backbone(str(directory), cache_dir=tmp_path / "cache", calibrate=False)
    model = methods.tune(backbone, LoraSettings(rank=2, layers=[1]), seed=0).model
    adapted = {name.rpartition(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 7
    assert all(".layers.1." in name for name in adapted)
