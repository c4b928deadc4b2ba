"""`trainer estimate --nproc` against what the ranks of a run hold at their fullest moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polyhead_trainer.config import load_config
from polyhead_trainer.estimate import estimate
from rank_memory import measured_peaks
from tiny import save_backbone
from trainer_processes import write_run

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
"""Where a batch of 7 needs about as much as the weights."""
MIXED = ["parallel.param_dtype=bfloat16"]
SUMMED_IN_FLOAT32 = [*MIXED, "parallel.reduce_dtype=float32", "parallel.output_dtype=float32"]
DDP = ["parallel.strategy=ddp"]


@dataclass(frozen=True, kw_only=True)
class Case:
    method: str = "full"
    quantization: str = "none"
    num_ranks: int = 2
    kind: str = "llama"
    shape: dict[str, Any] = field(default_factory=lambda: WIDE)
    settings: list[str] = field(default_factory=list)


CASES = {
    "full": Case(),
    "full in bfloat16": Case(settings=MIXED),
    "full in bfloat16, summed in float32": Case(settings=SUMMED_IN_FLOAT32),
    "full, mostly activations": Case(shape={}, settings=["training.batch_size=18"]),
    "full in bfloat16, mostly activations": Case(shape={}, settings=["training.batch_size=18", *MIXED]),
    "full, mostly vocabulary": Case(kind="llama-untied", shape={**WIDE, "vocab_size": 8192}),
    "full, checkpointed": Case(settings=["training.activation_checkpointing=all", "training.batch_size=18"]),
    "full, in micro-batches": Case(settings=["training.micro_batch_size=2"]),
    "full on 4": Case(num_ranks=4),
    "lora": Case(method="lora"),
    "lora on int8": Case(method="lora", quantization="int8"),
    "lora on int8 in bfloat16": Case(method="lora", quantization="int8", settings=MIXED),
    "lora, replicated": Case(method="lora", settings=[*DDP, "adapter.rank=64"]),
    "lora on int8, replicated": Case(method="lora", quantization="int8", settings=DDP),
    "full, replicated": Case(settings=DDP),
    "full, replicated, in micro-batches": Case(settings=[*DDP, "training.micro_batch_size=2"]),
}
FAST = {"full in bfloat16", "lora on int8", "full, replicated, in micro-batches"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_peak_is_that_of_the_fullest_rank(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    save_backbone(case.kind, tmp_path / "backbone", **case.shape)
    file = write_run(tmp_path, method=case.method, quantization=case.quantization, steps=3, dropout=0.0)
    config = load_config(file, ["checkpoint.every_steps=0", *case.settings])
    measured = measured_peaks(config, case.num_ranks)
    predicted = estimate(config, nproc=case.num_ranks)
    print(name, predicted.parts(), "measured", measured, predicted.peak / max(measured))
    assert predicted.peak == pytest.approx(max(measured), rel=0.1)
