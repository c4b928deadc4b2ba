"""`trainer run` on CUDA: every kind of base learns, its adapter comes back with the run's figures, and the memory is as
estimated."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the trainer needs it")

from integration.test_trainer_run import configuration, run_quietly
from polyhead_trainer.estimate import estimate
from polyhead_trainer.reevaluate import measure, read_subject
from tiny import save_backbone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BASES = ["int8", "llm.int8", "nf4", "none"]


@pytest.mark.parametrize("quantization", BASES)
def test_an_adapter_learns_and_comes_back(tmp_path: Path, quantization: str) -> None:
    config = configuration(
        tmp_path, f"backbone.quantization={quantization}", "backbone.device=cuda", "training.max_steps=20"
    )
    record = run_quietly(config).record
    assert record.after.held_out_loss < 0.9 * record.before.held_out_loss
    found = measure(read_subject(config.output, [])).after
    assert found.held_out_loss == pytest.approx(record.after.held_out_loss, rel=0.02)


@pytest.mark.parametrize("quantization", BASES)
def test_a_run_takes_the_memory_that_was_estimated(tmp_path: Path, quantization: str) -> None:
    """Large enough that cuBLAS' workspace is a small part of it."""
    save_backbone("llama", tmp_path / "backbone", hidden_size=1024, intermediate_size=2816, num_attention_heads=16)
    config = configuration(
        tmp_path, f"backbone.quantization={quantization}", "backbone.device=cuda", "training.batch_size=64"
    )
    rows = [{"prompt": f"Say it {n} times:", "completion": " again" * (40 + n % 20)} for n in range(64)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_quietly(config)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = estimate(config)
    print(quantization, predicted.parts(), "measured", measured, predicted.peak / measured)
    assert predicted.peak == pytest.approx(measured, rel=0.1)
