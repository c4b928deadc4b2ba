"""The shared int8 layer: its format, its gradients, its place under PEFT."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from polyhead_core.int8 import Int8Linear, quantize_weight


def test_weights_are_laid_out_as_bitsandbytes_lays_them_out() -> None:
    weight = torch.randn(96, 64)
    weight[3] = 0
    quantized, absmax = quantize_weight(weight)
    theirs, their_absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    ours_half, _ = quantize_weight(weight.half())
    torch.testing.assert_close(absmax, their_absmax, rtol=1e-3, atol=1e-3)
    assert (ours_half.int() - theirs.int()).abs().max() <= 1  # they round in half precision
    assert quantized[3].abs().max() == 0


def test_many_rows_quantise_as_each_alone() -> None:
    weight, scale = torch.randn(9000, 16), torch.rand(16) + 0.5
    quantized, absmax = quantize_weight(weight, scale)
    alone, alone_absmax = quantize_weight(weight[8500:8501], scale)
    assert torch.equal(quantized[8500:8501], alone)
    assert torch.equal(absmax[8500:8501], alone_absmax)


def test_dequantize_gives_back_the_weight_within_half_a_step() -> None:
    weight, scale = torch.randn(40, 64), torch.rand(64) + 0.5
    layer = Int8Linear.from_weight(weight, None, scale)
    bound = (layer.SCB / 127 / 2)[:, None] / scale * 1.001
    assert ((layer.dequantize() - weight).abs() <= bound).all()


def test_the_gradient_is_that_of_the_dequantised_layer() -> None:
    layer = Int8Linear.from_weight(torch.randn(40, 64), None, torch.rand(64) + 0.5, torch.tensor([1, 7]))
    x = torch.randn(3, 5, 64, requires_grad=True)
    g = torch.randn(3, 5, 40)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ layer.dequantize(), rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


def test_calibrated_scales_refuse_to_be_cast() -> None:
    layer = Int8Linear.from_weight(torch.randn(8, 8))
    with pytest.raises(TypeError, match="must stay float32"):
        layer.to(torch.bfloat16)


def test_peft_trains_lora_over_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Int8Linear.from_weight(torch.randn(64, 64)), nn.ReLU(), Int8Linear.from_weight(torch.randn(8, 64))
    )
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(tuned(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
