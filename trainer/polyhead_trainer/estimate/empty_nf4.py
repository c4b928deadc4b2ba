"""A linear layer in NF4 (Dettmers et al. 2023) without numbers: bitsandbytes' own, its tensors of shapes alone."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

BLOCK = 64
"""Weights that share a scale."""
SCALES_BLOCK = 256
"""Scales in 8 bits that share one in float32: double quantisation."""
CODES = 16 + 256
"""float32 numbers that 4 bits and a scale's 8 bits stand for."""


class EmptyNf4Linear(Linear4bit):
    """What bitsandbytes keeps beside the weight, where nothing that lists tensors finds it, is a buffer here."""

    scales: Tensor
    scales_of_scales: Tensor
    codes: Tensor

    def __init__(self, module: nn.Linear, compute: torch.dtype) -> None:
        rows, columns, has_bias = module.out_features, module.in_features, module.bias is not None
        super().__init__(columns, rows, has_bias, compute_dtype=compute, quant_type="nf4", device="meta")  # type: ignore[no-untyped-call]
        num_scales = ceil(rows * columns / BLOCK)
        packed = torch.empty(ceil(rows * columns / 2), 1, dtype=torch.uint8, device="meta")
        self.weight.data = packed
        if has_bias:
            self.bias.data = torch.empty(rows, dtype=compute, device="meta")
        self.register_buffer("scales", torch.empty(num_scales, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales_of_scales", torch.empty(ceil(num_scales / SCALES_BLOCK) + 1, device="meta"))
        self.register_buffer("codes", torch.empty(CODES, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x.to(self.compute_dtype), self.scales, self.in_features, self.out_features)
        product: Tensor = _Product.apply(*inputs)  # type: ignore[no-untyped-call]
        return (product if self.bias is None else product + self.bias).to(x.dtype)


class _Product(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: each pass makes the whole weight in the type of its input, and keeps none of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, width: int, out: int) -> Tensor:
        ctx.scales, ctx.shape = scales, (out, width)
        weight = _whole_weight(x, scales, ctx.shape)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient @ _whole_weight(gradient, ctx.scales, ctx.shape), None, None, None


def _whole_weight(like: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    float_scales = scales.float()
    weight = like.new_empty(shape)
    del float_scales  # held until the weight is there
    return weight
