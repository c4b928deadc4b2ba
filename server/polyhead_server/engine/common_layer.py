"""Finds decoder layers of the common form by structure, and takes them apart.

The common form: pre-norm, grouped heads, rotary by halves, gated MLP, all linear layers in int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels.decoder import Activation, Int8Group

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, kw_only=True)
class CommonLayer:
    """A decoder layer's modules, taken apart."""

    linears: tuple[Int8Linear, ...]
    """q, k, v, o, gate, up, down."""
    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    q_norm: Tensor  # [head width], or empty
    k_norm: Tensor
    eps: float
    activation: Activation


def take_apart(layer: nn.Module) -> CommonLayer | None:
    """The layer's parts if it is of the common form and holds nothing else, None if not."""
    parts = {
        path: module for path, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    has_head_norms = set(_HEAD_NORMS) <= set(parts)
    if set(parts) != {*LINEARS, *_NORMS, *(_HEAD_NORMS if has_head_norms else ())}:
        return None
    linears = [parts[path] for path in LINEARS]
    if not all(isinstance(linear, Int8Linear) for linear in linears):
        return None
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    norms = [rms_norm_of(parts[path]) for path in (*_NORMS, *(_HEAD_NORMS if has_head_norms else ()))]
    activation = _activation(getattr(getattr(layer, "mlp", None), "act_fn", None))
    found = [norm for norm in norms if norm is not None]
    if len(found) < len(norms) or activation is None or len({eps for _, eps in found}) != 1:
        return None
    if not (_same_input(*int8[:3]) and _same_input(*int8[4:6])):
        return None
    weights = [weight for weight, _ in found] + [found[0][0].new_empty(0)] * (4 - len(found))
    return CommonLayer(
        linears=tuple(int8),
        input_norm=weights[0],
        post_norm=weights[1],
        q_norm=weights[2],
        k_norm=weights[3],
        eps=found[0][1],
        activation=activation,
    )


def _same_input(*linears: Int8Linear) -> bool:
    """Whether the layers quantise their input in the same way."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    first = linears[0]
    return all(
        same(first.input_scale, one.input_scale) and same(first.outlier_columns, one.outlier_columns) for one in linears
    )


def rms_norm_of(module: nn.Module) -> tuple[Tensor, float] | None:
    """(weight, eps) of an RMS norm, seen by what it does to a row of ones: some models keep the weight less one."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
    with torch.no_grad():
        seen = module(torch.ones(1, len(weight), device=weight.device))[0] * (1 + eps) ** 0.5
    for candidate in (weight, 1 + weight):
        if torch.allclose(seen, candidate, rtol=1e-5, atol=1e-6):
            return candidate.contiguous(), float(eps)
    return None


def _activation(module: Any) -> Activation | None:
    if not callable(module):
        return None
    x = torch.linspace(-8, 8, 65)
    with torch.no_grad():
        y = module(x)
    known = {Activation.SILU: functional.silu(x), Activation.GELU_TANH: functional.gelu(x, approximate="tanh")}
    return next((one for one, expected in known.items() if torch.allclose(y, expected, atol=1e-6)), None)


def side_by_side(linears: Sequence[Int8Linear]) -> Int8Group:
    """The outputs of all of them side by side; they quantise their input in the same way."""
    first = linears[0]
    biases: list[Tensor] = [torch.zeros_like(one.SCB) if one.bias is None else one.bias for one in linears]
    has_bias = any(one.bias is not None for one in linears)
    return Int8Group(
        weight_OI=torch.cat(tuple(one.weight.data for one in linears)),
        absmax_O=torch.cat([one.SCB for one in linears]),
        input_scale_I=first.input_scale,
        outlier_columns_K=first.outlier_columns,
        bias_O=torch.cat(biases) if has_bias else None,
    )
