"""The int8 linear layer that server and trainer share, in LLM.int8's layout: int8 weights, one absmax per output row.

The quantisation of activations is per row and never looks across rows, so a row's result is independent of its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from polyhead_core.kernels import dispatch
from polyhead_core.kernels.reference import INT8_MAX

_ROWS_AT_ONCE = 4096  # bounds the float32 copies made while a weight is quantised


def quantize_weight(weight_OI: Tensor, input_scale_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row-wise absmax of W (times input_scale): (int8 [out, in], float32 absmax [out]), laid out as LLM.int8 does."""
    quantized_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    absmax_O = torch.empty(weight_OI.shape[0], device=weight_OI.device)
    for rows in torch.arange(weight_OI.shape[0]).split(_ROWS_AT_ONCE):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        scaled = weight_OI[part].float() if input_scale_I is None else weight_OI[part].float() * input_scale_I
        absmax_O[part] = scaled.abs().amax(dim=1)
        factor = torch.where(absmax_O[part] > 0, INT8_MAX / absmax_O[part], 0.0).unsqueeze(1)
        quantized_OI[part] = (scaled * factor).round().to(torch.int8)
    return quantized_OI, absmax_O


class Int8Linear(nn.Linear):
    """y = x W^T + b with frozen int8 W. A subclass of nn.Linear, so PEFT's plain LoRA path takes it.

    State: `weight` int8 [out, in] and `SCB` float32 [out], named and laid out as bitsandbytes saves them; `input_scale`
    float32 [in] and `outlier_columns` int64 [k] from calibration, absent (None) for checkpoints that have none.
    With calibration W[o, i] = weight[o, i] * SCB[o] / 127 / input_scale[i].
    """

    SCB: Tensor
    input_scale: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: Any = None) -> None:
        # nn.Linear's own initialiser would allocate and fill a float weight: built on the meta device, then replaced.
        super().__init__(in_features, out_features, bias=bias, device="meta")
        int8 = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(int8, requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)
        self.register_buffer("SCB", torch.empty(out_features, device=device))
        self.register_buffer("input_scale", None)
        self.register_buffer("outlier_columns", None)
        self.register_buffer("outlier_weight", None, persistent=False)
        self._packed: dispatch.PackedLinear | None = None
        self.keeps_packed = True
        """Whether the packed form outlives a product. Not where `weight` comes and goes in shards."""

    @classmethod
    def from_weight(
        cls,
        weight_OI: Tensor,
        bias_O: Tensor | None = None,
        input_scale_I: Tensor | None = None,
        outlier_columns_K: Tensor | None = None,
    ) -> Int8Linear:
        """Quantises a float weight [out, in]."""
        layer = cls(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
        layer.set_int8(*quantize_weight(weight_OI, input_scale_I), bias_O, input_scale_I, outlier_columns_K)
        return layer

    def set_int8(
        self,
        weight_OI: Tensor,
        absmax_O: Tensor,
        bias_O: Tensor | None = None,
        input_scale_I: Tensor | None = None,
        outlier_columns_K: Tensor | None = None,
    ) -> None:
        """Takes over quantised tensors as they are, without a copy."""
        assert weight_OI.dtype == torch.int8
        assert weight_OI.shape == (self.out_features, self.in_features)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.SCB = absmax_O.float()
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O.float(), requires_grad=False)
        self.input_scale = input_scale_I
        self.outlier_columns = outlier_columns_K
        self.outlier_weight = None if outlier_columns_K is None else weight_OI[:, outlier_columns_K].contiguous()
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any float type -> [..., out] of the same type; differentiable in x."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Int8Product.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        packed = self.packed() if x.device.type == "cpu" else None
        if packed is not None:
            y = packed.forward(rows)
        else:
            y = dispatch.int8_linear(
                rows, self.weight, self.SCB, self.input_scale, self.outlier_columns, self.outlier_weight, self.bias
            )
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def packed(self) -> dispatch.PackedLinear | None:
        """The layer as the CPU's kernels read it, made on first use beside `weight`; None where there are none."""
        if not self.keeps_packed:
            return self._pack(lasting=False)
        if self._packed is None:
            self._packed = self._pack(lasting=False)
        return self._packed

    def forget_packed(self) -> None:
        """Frees the packed copy; the next product makes it anew."""
        self._packed = None

    def prepack(self) -> None:
        """Keeps the packed form alone, for serving, where nobody multiplies by `weight` again."""
        packed = self._pack(lasting=True)
        if packed is not None:
            self._packed = packed
            self.release_weight()

    def release_weight(self) -> None:
        """Gives up `weight`, of which somebody who multiplies has a copy of his own."""
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        self.outlier_weight = None

    @property
    def is_released(self) -> bool:
        return self.weight.is_meta and self._packed is None

    def _pack(self, *, lasting: bool) -> dispatch.PackedLinear | None:
        return dispatch.pack_linear(
            self.weight, self.SCB, self.input_scale, self.outlier_columns, self.bias, lasting=lasting
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack their own.
        return {**self.__dict__, "_packed": None}

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in] that this layer stands for; not after `release_weight`."""
        int8_OI = self._packed.weight() if self.weight.is_meta and self._packed is not None else self.weight
        weight_OI = int8_OI.float() * (self.SCB / INT8_MAX).unsqueeze(1)
        return weight_OI if self.input_scale is None else weight_OI / self.input_scale

    @property
    def W_q(self) -> Tensor:
        """The name by which PEFT recognises a quantised weight and calls `dequantize` (as for HQQ); without it the
        magnitudes of DoRA would be computed from raw int8 values."""
        return self.weight

    def extra_repr(self) -> str:
        outliers = 0 if self.outlier_columns is None else len(self.outlier_columns)
        smoothed = self.input_scale is not None
        return f"{super().extra_repr()}, smoothed={smoothed}, outlier_columns={outliers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # `.to(dtype)`, `.half()` and the like must not touch the scales: they are part of the int8 format.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._packed = None
        for name in ("SCB", "input_scale"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != torch.float32:
                raise TypeError(f"Int8Linear.{name} must stay float32; got {tensor.dtype}: move the device only")
        return self


class _Int8Product(torch.autograd.Function):
    """Forward in int8, straight-through backward: dL/dx = (g * SCB / 127) W_q / input_scale."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return layer.product(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        layer: Int8Linear = ctx.layer  # type: ignore[attr-defined]
        (g,) = grads
        rows = g.reshape(-1, layer.out_features)
        grad_x = dispatch.int8_linear_backward(rows, layer.weight, layer.SCB, layer.input_scale)
        return grad_x.view(*g.shape[:-1], layer.in_features), None
