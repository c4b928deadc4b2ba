"""`trainer estimate` against what a run holds: weights, adapter, optimizer. The peak is not compared here."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_trainer_run import configuration

from polyhead_trainer import backbones, methods
from polyhead_trainer.estimate import estimate


@pytest.mark.parametrize("quantization", ["int8", "none", "llm.int8"])
def test_weights_and_adapter_are_what_a_run_holds(tmp_path: Path, quantization: str) -> None:
    config = configuration(tmp_path, f"backbone.quantization={quantization}")
    predicted = estimate(config)
    backbone = backbones.load(config.backbone)
    # bitsandbytes keeps its scales beside the parameters, where nothing that lists parameters or buffers finds them.
    scales = sum(w.SCB.nbytes for w in backbone.model.parameters() if getattr(w, "SCB", None) is not None)
    assert predicted.weights == pytest.approx(backbone.num_bytes + scales, rel=0.01)
    model = methods.tune(backbone, config.adapter, 0).model
    assert predicted.adapter == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert predicted.optimizer == 2 * predicted.gradients == 2 * predicted.adapter
    assert (predicted.batch.num_rows, predicted.activations > 0) == (6, True)


def test_smaller_micro_batches_need_fewer_activations(tmp_path: Path) -> None:
    whole = estimate(configuration(tmp_path))
    half = estimate(configuration(tmp_path, "training.micro_batch_size=3"))
    assert half.activations < 0.6 * whole.activations
    assert half.weights == whole.weights


def test_two_ranks_hold_half_and_gather_layers(tmp_path: Path) -> None:
    whole, half = (estimate(configuration(tmp_path), nproc=nproc) for nproc in (1, 2))
    assert half.optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)
    assert half.batch.num_rows == whole.batch.num_rows / 2
    assert whole.gathered == 0 < half.gathered < whole.weights + whole.adapter
    replica = estimate(configuration(tmp_path, "parallel.strategy=ddp"), nproc=2)
    assert (replica.weights, replica.optimizer) == (whole.weights, whole.optimizer)


def test_the_settings_that_save_memory_are_seen(tmp_path: Path) -> None:
    plain = estimate(configuration(tmp_path, "adapter.rank=64"))
    checkpointed = estimate(configuration(tmp_path, "adapter.rank=64", "training.activation_checkpointing=all"))
    assert checkpointed.activations < 0.7 * plain.activations
    eight_bit = estimate(configuration(tmp_path, "adapter.rank=64", "training.optimizer=adamw-8bit"))
    assert eight_bit.optimizer < 0.5 * plain.optimizer
    chunked = estimate(configuration(tmp_path, "adapter.rank=64", "training.logit_chunk=2000"))
    assert chunked.logits == 3 * 2000 * 4 < plain.logits
