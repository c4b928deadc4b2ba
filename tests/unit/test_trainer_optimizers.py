"""Optimizers by name, what they hold, the schedules, and NEFTune's noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_trainer_loop import EXAMPLES, OBJECTIVE, PAD, Keep, made, tiny_lora
from torch import nn

from polyhead_core.errors import ConfigError
from polyhead_trainer.batching import collate, pack
from polyhead_trainer.config import TrainingSection
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.neftune import noisy_embeddings
from polyhead_trainer.objectives.label_logits import label_logits
from polyhead_trainer.optimizers import make_optimizer, state_bytes
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.schedule import learning_rate_factor

SHAPES = [(64, 128), (3, 40, 50), (63, 63), (4096,), (5000,), (7,)]
"""Some just below and some just above what bitsandbytes keeps in 8 bits, one whose last block is not full."""
ON_CPU = {"adamw": 1e-2, "adamw-8bit": 1e-2, "sgd": 1.0, "adafactor": 3e-1}
"""A learning rate that lets each of them learn the tiny task in a few steps."""


def section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate({"max_steps": 12, "batch_size": 6, **values})


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all distinct state tensors but step counters."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("values", [*({"optimizer": name} for name in ON_CPU), {"optimizer": "sgd", "momentum": 0.9}])
def test_the_predicted_states_are_those_that_are_held(values: dict[str, object]) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make_optimizer([{"params": parameters, "lr": 1e-3}], section(**values))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert state_bytes(str(values["optimizer"]), parameters, section(**values)) == held_bytes(optimizer)


@pytest.mark.parametrize("name", sorted(ON_CPU))
def test_every_optimizer_learns(tmp_path: Path, name: str) -> None:
    reports: list[StepReport] = []
    settings = section(optimizer=name, learning_rate=ON_CPU[name])
    TrainingLoop(tiny_lora(tmp_path), OBJECTIVE, EXAMPLES, settings).run([Keep(reports)])
    assert reports[-1].loss < 0.9 * reports[0].loss


def test_adamw_in_8_bits_stays_close_to_adamw() -> None:
    """The same gradients move the same weights about as far; and the states are in 8 bits, or this shows nothing."""
    moved = []
    for name in ("adamw", "adamw-8bit"):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.zeros(64, 128))
        optimizer = make_optimizer([{"params": [parameter], "lr": 1e-2}], section(optimizer=name))
        for _ in range(20):
            parameter.grad = torch.randn_like(parameter) + 0.5
            optimizer.step()
        moved.append(parameter.detach())
    assert optimizer.state[parameter]["state1"].dtype == torch.uint8
    error = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert 0 < error < 0.1


def test_a_group_keeps_its_own_peak_rate() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, (1e-3, 1e-2), strict=True)]
    for name in ON_CPU:
        optimizer = make_optimizer([dict(group) for group in groups], section(optimizer=name))
        assert [group["peak_lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_pages_are_refused_by_name_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer = paged-adamw-8bit .* on cpu.*use adamw-8bit"):
        TrainingLoop(tiny_lora(tmp_path), OBJECTIVE, EXAMPLES, section(optimizer="paged-adamw-8bit"))


@pytest.mark.parametrize("schedule", ["cosine-with-min", "wsd", "inverse-sqrt"])
def test_further_schedules_rise_then_fall(schedule: str) -> None:
    settings = section(schedule=schedule, warmup=0.1, min_learning_rate=0.2, decay=0.25)
    rates = [learning_rate_factor(settings, step, 200) for step in range(200)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    after = rates[20:]
    assert max(rates) == 1
    assert after == sorted(after, reverse=True)
    if schedule == "cosine-with-min":
        assert after[-1] == pytest.approx(0.2, abs=1e-3)
        assert after[90] == pytest.approx(0.6)
    elif schedule == "wsd":
        assert after[:135] == [1.0] * 135
        assert after[-1] == pytest.approx(1 / 45)
        assert after[-23] == pytest.approx(23 / 45)
    else:
        assert after[59] == pytest.approx(0.5)  # four times the warm-up's steps: half the rate


@pytest.mark.parametrize("schedule", ["cosine-with-min", "wsd", "inverse-sqrt"])
def test_schedules_without_a_warm_up_start_at_the_peak(schedule: str) -> None:
    settings = section(schedule=schedule, warmup=0.0, decay=0.0)
    assert learning_rate_factor(settings, 0, 5) == 1
    assert all(0 < learning_rate_factor(settings, step, 5) <= 1 for step in range(5))


def test_neftune_adds_bounded_noise_in_training_alone(tmp_path: Path) -> None:
    model = tiny_lora(tmp_path).model
    ids = torch.randint(4, 280, (4, 9))
    table = model.get_input_embeddings()
    plain = table(ids)
    bound = 5 / math.sqrt(9 * plain.shape[-1])
    with noisy_embeddings(model, 5.0):
        model.train()
        noise = table(ids) - plain
        model.eval()
        assert torch.equal(table(ids), plain)
    model.train()
    assert torch.equal(table(ids), plain), "the hook must go with the block"
    assert 0.9 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert noise.mean().abs() < 0.1 * bound
    assert noise.var() == pytest.approx(bound**2 / 3, rel=0.1)


def test_neftune_goes_by_each_packed_examples_own_length(tmp_path: Path) -> None:
    model = tiny_lora(tmp_path, quantization="none").model.train()
    examples = made([(2, 2), (30, 34)])
    prepare_packing(model, examples, PAD)
    table = model.get_input_embeddings()
    seen: list[torch.Tensor] = []
    with noisy_embeddings(model, 5.0):
        handle = table.register_forward_hook(lambda _, inputs, embedded: seen.append(embedded - table.weight[inputs]))
        label_logits(model, pack(examples))
        label_logits(model, collate(examples, PAD))
        handle.remove()
    packed_1TH, padded_BTH = seen
    for noise_TH, length in ((packed_1TH[0, :4], 4), (packed_1TH[0, 4:], 64), (padded_BTH, 64)):
        bound = 5 / math.sqrt(length * noise_TH.shape[-1])
        assert 0.9 * bound < noise_TH.abs().max() <= bound * (1 + 1e-5)


def test_neftune_changes_what_is_learned_and_zero_changes_nothing(tmp_path: Path) -> None:
    def losses(**values: object) -> list[float]:
        reports: list[StepReport] = []
        TrainingLoop(tiny_lora(tmp_path), OBJECTIVE, EXAMPLES, section(max_steps=3, **values)).run([Keep(reports)])
        return [report.loss for report in reports]

    plain = losses()
    assert losses(neftune_alpha=0.0) == plain
    assert losses(neftune_alpha=5.0)[0] != plain[0]
