"""Picks, per device, the implementation of each kernel: C++ on the CPU, Triton on CUDA, the torch reference elsewhere.

Float activations of other types than float32 are computed in float32 and rounded once, at the end; but with queries and
pages in bfloat16 Triton's attention also rounds its weights to bfloat16, for the tensor cores' product with V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from polyhead_core.kernels import reference
from polyhead_core.kernels.decoder import DecoderShape, DecoderStack
from polyhead_core.kernels.draw import Draw
from polyhead_core.kernels.tables import AdapterTables


def _cpu(tensor: Tensor) -> Any | None:
    if tensor.device.type != "cpu":
        return None
    from polyhead_core.kernels.cpu import build  # built on the first use of the CPU, not at import

    return build.load()


def _triton(tensor: Tensor) -> Any | None:
    if tensor.device.type != "cuda":
        return None
    from polyhead_core.kernels import cuda  # triton is imported on the first use of CUDA, not at import

    return cuda.load()


class PackedLinear(Protocol):
    """A frozen int8 linear layer in the order in which this machine's products read it."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """float [T, in] -> float32 [T, out], as reference.int8_linear."""
        ...

    def num_bytes(self) -> int: ...

    def weight(self) -> Tensor:
        """The int8 weight [out, in] that was packed."""
        ...


def pack_linear(
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    lasting: bool = False,
) -> PackedLinear | None:
    """A copy of the layer for the CPU's kernels; None on a device that has no need of one.

    `lasting`: on huge pages, which it shares with others of its kind until the last of them is gone.
    """
    if _cpu(weight_OI) is None:
        return None
    packed: PackedLinear = torch.classes.polyhead_cpu.PackedLinear(
        weight_OI.contiguous(), absmax_O, input_scale_I, outlier_columns_K, bias_O, lasting
    )
    return packed


def int8_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """See reference.int8_linear; x may be of any float type, the result is float32 [T, O]."""
    if x_TI.shape[0] == 0:  # a step that only prefills wants no logits
        return x_TI.new_empty(0, weight_OI.shape[0], dtype=torch.float32)
    triton = _triton(x_TI)
    function = reference.int8_linear if triton is None else triton.int8_linear
    result: Tensor = function(x_TI, weight_OI, absmax_O, input_scale_I, outlier_columns_K, outlier_weight_OK, bias_O)
    return result


def int8_linear_backward(
    g_TO: Tensor, weight_OI: Tensor, absmax_O: Tensor, input_scale_I: Tensor | None = None
) -> Tensor:
    """See reference.int8_linear_backward, in g's type; on a CPU's tile unit as exact as in float32, in float32."""
    kernels = _cpu(g_TO)
    if kernels is None or not kernels.runs_backward():
        return reference.int8_linear_backward(g_TO, weight_OI, absmax_O, input_scale_I)
    scale_O = absmax_O / reference.INT8_MAX
    result: Tensor = kernels.int8_linear_backward(g_TO.float(), weight_OI.contiguous(), scale_O, input_scale_I)
    return result.to(g_TO.dtype)


def low_rank_add(y_TO: Tensor, x_TI: Tensor, tables: AdapterTables, site: int, slots_T: Tensor) -> Tensor:
    """y with the adapters' products added; float32 y is changed in place. See reference.low_rank_add."""
    out = y_TO.float().contiguous()
    kernels = _cpu(out)
    if triton := _triton(out):
        triton.low_rank_add(out, x_TI, tables, site, slots_T)
    elif kernels is None:
        reference.low_rank_add(out, x_TI, tables, site, slots_T)
    else:
        x = x_TI.float().contiguous()
        kernels.low_rank_add(out, x, tables.arena, tables.num_pages, tables.pages, tables.bias, site, slots_T)
    return out.to(y_TO.dtype)


def embedding_add(
    y_TO: Tensor, token_ids_T: Tensor, tables: AdapterTables, site: int, slots_T: Tensor, vocab: int
) -> Tensor:
    """y with the adapters' embedding rows added; float32 y is changed in place. See reference.embedding_add."""
    out = y_TO.float().contiguous()
    kernels = _cpu(out)
    if triton := _triton(out):
        triton.embedding_add(out, token_ids_T, tables, site, slots_T)
    elif kernels is None:
        reference.embedding_add(out, token_ids_T, tables, site, slots_T, vocab)
    else:
        kernels.embedding_add(
            out, token_ids_T, tables.arena, tables.num_pages, tables.pages, tables.bias, site, slots_T
        )
    return out.to(y_TO.dtype)


def paged_attention(
    q_THD: Tensor,
    k_pages_NGBD: Tensor,
    v_pages_NGBD: Tensor,
    block_tables_SM: Tensor,
    sequence_T: Tensor,
    positions_T: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    key_offsets_S: Tensor | None = None,
) -> Tensor:
    """See reference.paged_attention; the result [T, H, D] has q's type."""
    arguments = (
        k_pages_NGBD, v_pages_NGBD, block_tables_SM, sequence_T, positions_T, scale, sliding_window, softcap,
        key_offsets_S,
    )  # fmt: skip
    if triton := _triton(q_THD):
        attended: Tensor = triton.paged_attention(q_THD, *arguments)
        return attended
    kernels = _cpu(q_THD)
    if kernels is None:
        return reference.paged_attention(q_THD, *arguments)
    result: Tensor = kernels.paged_attention(q_THD.float().contiguous(), *arguments)
    return result.to(q_THD.dtype)


def rms_norm(x_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm; for the few rows of which logits are wanted: on the CPU one thread's work."""
    if triton := _triton(x_TI):
        normed: Tensor = triton.rms_norm(x_TI, weight_I, eps)
        return normed
    kernels = _cpu(x_TI)
    if kernels is None:
        return reference.rms_norm(x_TI, weight_I, eps)
    result: Tensor = kernels.rms_norm(x_TI.float().contiguous(), weight_I, eps)
    return result


def greedy(logits_LV: Tensor) -> Tensor:
    """See reference.greedy; [L] int64."""
    kernels = _triton(logits_LV) or _cpu(logits_LV) or reference
    result: Tensor = kernels.greedy(logits_LV.contiguous())
    return result


def draw(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
    """See reference.draw; rows on the CPU, each contiguous."""
    kernels = _cpu(rows[0]) if rows else None
    if kernels is None:
        return reference.draw(rows, draws)
    result: list[int] = kernels.draw(list(rows), torch.tensor(draws, dtype=torch.float64)).tolist()
    return result


def write_kv(k_TGD: Tensor, v_TGD: Tensor, k_pages_NGBD: Tensor, v_pages_NGBD: Tensor, slot_mapping_T: Tensor) -> None:
    """See reference.write_kv: an indexed copy on the CPU, one launch on CUDA."""
    write = _triton(k_TGD) or reference
    write.write_kv(k_TGD, v_TGD, k_pages_NGBD, v_pages_NGBD, slot_mapping_T)


def decoder_stack(shape: DecoderShape, device: torch.device) -> DecoderStack | None:
    """Decoder layers as one call; None on a device without kernels for them."""
    probe = torch.empty(0, device=device)
    if triton := _triton(probe):
        stack: DecoderStack = triton.TritonDecoderStack(shape)
        return stack
    if _cpu(probe) is None:
        return None
    from polyhead_core.kernels.cpu.decoder import CpuDecoderStack

    return CpuDecoderStack(shape)


def keys_lie_transposed(device: torch.device) -> bool:
    """Whether attention reads a block's keys [D, block]: one vector load then takes the same element of several."""
    return device.type == "cpu"


def zeros_for_long(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [num_elements] that stay for the process's life, on huge pages where the device's kernels ask for them:
    what is read at random takes a miss of the TLB for each small page. torch.zeros writes before anyone could ask."""
    memory = torch.empty(num_elements, dtype=dtype, device=device)
    kernels = _cpu(memory)
    if kernels is not None:
        kernels.advise_huge_pages(memory)
    return memory.zero_()
