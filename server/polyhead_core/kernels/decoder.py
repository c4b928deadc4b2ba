"""A run of decoder layers of the common form as one call: what it is made of, and what a device's kernels offer.

The common form: pre-norm, grouped heads, rotary by halves, gated MLP, all seven linear layers in int8.
Shapes: T tokens, H hidden width, R rotary width, N KV blocks, G key/value heads, B block size, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from polyhead_core.kernels.tables import AdapterTables


class Activation(IntEnum):
    """Of the gated MLP; the numbers are those of the C++ kernel."""

    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    eps: float
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class Int8Group:
    """Int8 layers that quantise the same input in the same way, as one layer with their outputs side by side."""

    weight_OI: Tensor
    absmax_O: Tensor
    input_scale_I: Tensor | None
    outlier_columns_K: Tensor | None
    bias_O: Tensor | None


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer of the common form, taken apart. Norm weights are float32."""

    input_norm_H: Tensor
    post_norm_H: Tensor
    q_norm_D: Tensor
    """Of the heads' own norms, as k_norm_D; empty: none."""
    k_norm_D: Tensor
    qkv: Int8Group
    output: Int8Group
    gate_up: Int8Group
    down: Int8Group
    key_pages_NGBD: Tensor
    value_pages_NGBD: Tensor
    scale: float
    sliding_window: int
    """0: all keys are seen."""
    softcap: float
    """0: none."""
    sites: tuple[int, ...]
    """Those of q, k, v, o, gate, up, down."""


class DecoderStep(Protocol):
    """What the layers need to know of a step's rows; the engine's StepBatch is one."""

    @property
    def positions(self) -> Tensor: ...
    @property
    def sequence(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def key_offsets(self) -> Tensor: ...
    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def adapter_slots(self) -> Tensor: ...
    @property
    def active_sites(self) -> frozenset[int]: ...
    @property
    def tables(self) -> AdapterTables: ...


class DecoderStack(Protocol):
    """Layers that were added in order."""

    def add_layer(self, layer: DecoderLayer) -> None:
        """May keep copies of the int8 weights, which the caller can then let go."""

    def forward(self, first: int, last: int, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor, step: DecoderStep) -> None:
        """Turns contiguous float32 x, in place, into the output of the layers [first, last) with the rows' adapters."""

    def take_phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase since the last call, waits for other threads included; empty: not measured."""
        ...
