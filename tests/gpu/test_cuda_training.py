"""`trainer run` on CUDA: every kind of base learns, and its adapter comes back with the run's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration.test_trainer_run import configuration, run_quietly
from polyhead_trainer.reevaluate import measure, read_subject

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("quantization", ["int8", "llm.int8", "nf4", "none"])
def test_an_adapter_learns_and_comes_back(tmp_path: Path, quantization: str) -> None:
    config = configuration(
        tmp_path, f"backbone.quantization={quantization}", "backbone.device=cuda", "training.max_steps=20"
    )
    record = run_quietly(config).record
    assert record.after.held_out_loss < 0.9 * record.before.held_out_loss
    found = measure(read_subject(config.output)).after
    assert found.held_out_loss == pytest.approx(record.after.held_out_loss, rel=0.02)
