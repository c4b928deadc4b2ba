"""MFU: what is counted against what torch counts product by product, and what the progress line says."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polyhead_trainer import utilization as utilization_module
from polyhead_trainer.loop import StepReport
from polyhead_trainer.progress import TrainingProgress
from polyhead_trainer.utilization import (
    Peak,
    StepFlops,
    Utilization,
    count_flops,
    mean_batch,
    multiplied_dtypes,
    peak_of,
)
from tiny import TARGETS, reference_model, save_backbone

ROWS, LENGTH, LABELS = 2, 24, 5
CPU = torch.device("cpu")


def counted_by_torch(model: nn.Module) -> int:
    """FLOPs of all linear products of one step with LABELS labels a row; attention's own are other operators."""
    tokens = torch.randint(4, 280, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, -LABELS:].reshape(-1)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=LABELS).logits
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
    counts = counter.get_flop_counts()
    # transformers 5.17 computes rotary angles as a product of matrices.
    angles = [flops for path, flops in counts.items() if path.endswith("rotary_emb")]
    return _products(counts["Global"]) - sum(map(_products, angles))


def _products(flops: Mapping[Any, int]) -> int:
    found = {str(operator): number for operator, number in flops.items()}
    return sum(found.get(f"aten.{name}", 0) for name in ("mm", "addmm", "bmm"))


def ours(model: nn.Module) -> float:
    flops = count_flops(model)
    assert flops is not None
    return flops.of(report(1, num_tokens=ROWS * LENGTH, num_labels=ROWS * LABELS), num_examples=ROWS)


def report(step: int, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": step,
        "num_steps": 2,
        "loss": 1.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "num_tokens": 100,
        "num_labels": 10,
        "seconds": 0.5,
    }
    return StepReport(**{**values, **changes})


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "gpt_neox"])
def test_all_weights_trained_is_what_torch_counts(tmp_path: Path, kind: str) -> None:
    model = reference_model(save_backbone(kind, tmp_path)).train().requires_grad_(True)
    assert ours(model) == counted_by_torch(model)
    flops = count_flops(model)
    assert flops is not None
    layers = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert flops.per_token + flops.per_label == 6 * layers


@pytest.mark.parametrize("layers", [None, [2]])
def test_an_adapter_needs_less(tmp_path: Path, layers: list[int] | None) -> None:
    """A little more is counted in the lowest adapted layer, where keys and values need no input gradient."""
    base = reference_model(save_backbone("llama", tmp_path))
    settings = LoraConfig(r=4, target_modules=TARGETS["llama"], layers_to_transform=layers)
    model = get_peft_model(base, settings).train()
    counted = counted_by_torch(model)
    assert counted <= ours(model) <= 1.15 * counted
    whole = reference_model(tmp_path).requires_grad_(True)
    assert ours(model) < (0.8 if layers is None else 0.55) * ours(whole)


LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
"""Weights of a tiny Llama layer: queries, keys and values of half as many heads, output, and the gated MLP."""
HEAD = 64 * 288
MLP_ENCODER = 64 * 32 + 32 * 32 + 32 * 64
LSTM_ENCODER = 2 * 4 * 16 * (64 + 16) + 2 * 4 * 16 * (32 + 16) + 32 * 32 + 32 * 64
"""Two layers in two directions of four gates each, and two linear layers."""
EVERYWHERE = {"per_token": 4 * 3 * LAYER, "per_label": 4 * HEAD}
"""Forward and the input's gradient, in all three layers and the head."""
IN_FRONT: list[tuple[PeftConfig, StepFlops]] = [
    (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        StepFlops(**EVERYWHERE, per_example=5 * 4 * 3 * LAYER),
    ),
    (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32),
        StepFlops(**EVERYWHERE, per_example=5 * 4 * 3 * LAYER, per_step=5 * 6 * MLP_ENCODER),
    ),
    (
        PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=5,
            encoder_hidden_size=16,
            encoder_reparameterization_type="LSTM",
        ),
        StepFlops(**EVERYWHERE, per_example=5 * 4 * 3 * LAYER, per_step=5 * 6 * LSTM_ENCODER),
    ),
    (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), StepFlops(**EVERYWHERE)),
    (
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=7, adapter_layers=2),
        # No gradient reaches the lowest layer; in the others the prompt's keys and values have one.
        StepFlops(per_token=(2 + 4 + 4) * LAYER, per_label=4 * HEAD, per_step=2 * 7 * 4 * (64 * 32 + 64 * 32)),
    ),
]


@pytest.mark.parametrize(
    ("settings", "expected"), IN_FRONT, ids=["prompts", "p-tuning", "p-tuning-lstm", "prefix", "llama-adapter"]
)
def test_virtual_tokens_are_counted_where_they_are(tmp_path: Path, settings: PeftConfig, expected: StepFlops) -> None:
    assert (LAYER, HEAD, MLP_ENCODER, LSTM_ENCODER) == (30_720, 18_432, 5_120, 19_456)
    model = get_peft_model(reference_model(save_backbone("llama", tmp_path)), settings)
    assert count_flops(model) == expected


@pytest.mark.parametrize("settings", [IN_FRONT[0][0], IN_FRONT[1][0]], ids=["prompts", "p-tuning"])
def test_virtual_tokens_in_front_are_what_torch_counts(tmp_path: Path, settings: PeftConfig) -> None:
    model = get_peft_model(reference_model(save_backbone("llama", tmp_path)), settings).train()
    assert ours(model) == counted_by_torch(model)


@pytest.mark.parametrize("setting", ["num_local_experts", "is_encoder_decoder"])
def test_where_a_token_meets_a_part_of_the_model_nothing_is_counted(setting: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert count_flops(model) == StepFlops(per_token=16, per_label=0)
    model.config = SimpleNamespace(**{setting: True})  # type: ignore[assignment]
    assert count_flops(model) is None


def test_the_share_is_flops_by_seconds_by_peak() -> None:
    peak = Peak(flops_per_s=1e6, source="")
    history = [report(1), report(2, num_tokens=300, seconds=1.5)]
    plain = StepFlops(per_token=1000, per_label=500)
    utilization = Utilization(flops=plain, measure_peak=lambda: peak, examples_per_step=8)
    assert utilization.share(history) == pytest.approx(0.205)
    assert utilization.share([]) == 0
    in_front = StepFlops(per_token=1000, per_label=500, per_example=2000, per_step=5000)
    longer = Utilization(flops=in_front, measure_peak=lambda: peak, examples_per_step=7.5)
    assert longer.share(history) == pytest.approx((410_000 + 2 * (15_000 + 5000)) / 2e6)


def test_the_best_peak_counts_of_those_before_and_after() -> None:
    """A processor that was busy at the start would make of a run more than the device can do."""
    peaks = iter(Peak(flops_per_s=flops, source=str(flops)) for flops in (1e5, 1e6, 2e5))
    utilization = Utilization(
        flops=StepFlops(per_token=1000, per_label=0), measure_peak=lambda: next(peaks), examples_per_step=8
    )
    assert utilization.share([report(1)]) == pytest.approx(2.0)
    for _ in range(2):
        utilization.measure_again()
        assert utilization.share([report(1)]) == pytest.approx(0.2)
        assert utilization.peak.source == "1000000.0"


def test_the_smaller_batch_of_an_epoch_is_part_of_the_mean() -> None:
    assert (mean_batch(8, 4), mean_batch(3, 16)) == (4, 3)
    assert mean_batch(10, 4) == (4 + 4 + 2) / 3


def test_the_peak_is_measured_where_no_data_sheet_is_known_and_takes_no_random_numbers() -> None:
    state = torch.get_rng_state()
    peak = peak_of(CPU, [torch.float32], num_ranks=2)
    assert torch.equal(state, torch.get_rng_state())
    assert 1e8 < peak.flops_per_s < 1e15
    assert peak.source == "2 x a float32 matmul, measured"


@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_fastest_type_that_the_run_multiplies_in(
    fastest: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utilization_module, "_seconds", lambda matrix: 1.0 if matrix.dtype == fastest else 2.0)
    peak = peak_of(CPU, multiplied_dtypes(torch.float32, "int8"), num_ranks=3)
    name = str(fastest).removeprefix("torch.")
    assert peak == Peak(flops_per_s=3 * 2 * 768**3, source=f"3 x a {name} matmul, measured")
    assert multiplied_dtypes(torch.float32, "none") == (torch.float32,)
    assert multiplied_dtypes(torch.bfloat16, "nf4") == (torch.bfloat16,)


def test_the_line_has_speed_utilisation_memory_and_the_time_left() -> None:
    stream = io.StringIO()
    loop: Any = SimpleNamespace(device=CPU)
    peak = Peak(flops_per_s=1e6, source="")
    progress = TrainingProgress(
        Console(file=stream, width=40),
        Utilization(flops=StepFlops(per_token=1000, per_label=0), measure_peak=lambda: peak, examples_per_step=8),
    )
    with progress:
        for step in (1, 2):
            progress.after_step(loop, report(step))
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 1/2  loss 1.0000  200 tokens/s  MFU 20.0%  peak memory ")
    assert last.endswith(" s left")
    assert math.isclose(progress.mfu or 0, 0.2)
    without = TrainingProgress(Console(file=stream, width=40))
    without.after_step(loop, report(1))
    assert without.mfu is None
    assert "MFU" not in stream.getvalue().splitlines()[-1]
