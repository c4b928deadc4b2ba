"""The definition of correct: every kernel as slow, obvious tensor code, which also runs where no faster path can.

Shapes: T tokens (rows), I input width, O output width, H query heads, G key/value heads, D head width, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables

INT8_MAX = 127.0


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise absmax int8: q = round(x / a), a = max|x| / 127 (LLM.int8, Dettmers et al. 2022, without outliers).

    Returns q [T, I] int8 and a [T, 1] float32. A row of zeros gets a = 1e-12 and q = 0.
    """
    scale_T1 = (x_TI.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp_min(1e-12)
    return (x_TI / scale_T1).round().to(torch.int8), scale_T1


def int8_product(q_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """q W^T with int32 accumulation: exact, so a row's result never depends on the other rows."""
    if q_TI.device.type == "cpu":
        return torch._int_mm(q_TI, weight_OI.t())
    # cuBLAS wants more than 16 rows and widths that are multiples of 8; zeros add nothing to a sum of products.
    rows, width, out = q_TI.shape[0], q_TI.shape[1], weight_OI.shape[0]
    q_padded = pad(q_TI, (0, -width % 8, 0, -rows % 32))
    weight_padded = pad(weight_OI, (0, -width % 8, 0, -out % 8))
    return torch._int_mm(q_padded, weight_padded.t())[:rows, :out]


def int8_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """y = (a q(x') W'^T + a1 q(x'_K) W'_K^T + a2 q(r) W'_K^T) * absmax / 127 + bias, in float32.

    x' = x / input_scale (smoothing: SmoothQuant, Xiao et al. 2022); its outlier columns K, fixed at conversion, are
    zero in the first product and carried by two more int8 products, x'_K = a1 q1 + r and r = a2 q2, which is 15 bits.
    All products are integers, so each row is bit for bit the same whatever shares its batch.
    """
    x_TI = x_TI.float()
    if input_scale_I is not None:
        x_TI = x_TI / input_scale_I
    if outlier_columns_K is None:
        q_TI, scale_T1 = quantize_rows(x_TI)
        y_TO = int8_product(q_TI, weight_OI).float() * scale_T1
    else:
        assert outlier_weight_OK is not None
        x_TK = x_TI[:, outlier_columns_K]
        q_TI, scale_T1 = quantize_rows(x_TI.index_fill(1, outlier_columns_K, 0.0))
        high_TK, high_scale_T1 = quantize_rows(x_TK)
        low_TK, low_scale_T1 = quantize_rows(x_TK - high_TK.float() * high_scale_T1)
        y_TO = int8_product(q_TI, weight_OI).float() * scale_T1
        y_TO += int8_product(high_TK, outlier_weight_OK).float() * high_scale_T1
        y_TO += int8_product(low_TK, outlier_weight_OK).float() * low_scale_T1
    y_TO *= absmax_O / INT8_MAX
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def int8_linear_backward(
    g_TO: Tensor, weight_OI: Tensor, absmax_O: Tensor, input_scale_I: Tensor | None = None
) -> Tensor:
    """dL/dx = (g * absmax / 127) W' / input_scale in g's type: int8_linear's quantisation taken for the identity."""
    g_TI = (g_TO * (absmax_O / INT8_MAX).to(g_TO.dtype)) @ weight_OI.to(g_TO.dtype)
    return g_TI if input_scale_I is None else g_TI / input_scale_I.to(g_TO.dtype)


def low_rank_add(y_TO: Tensor, x_TI: Tensor, tables: AdapterTables, site: int, slots_T: Tensor) -> None:
    """y[t] += sum over the pages p of slot[t] at `site` of B_p^T (A_p x[t]), plus its bias there; slot -1: none."""
    in_features, out_features = x_TI.shape[1], y_TO.shape[1]
    for t, slot in enumerate(slots_T.tolist()):
        if slot < 0:
            continue
        for page in range(int(tables.num_pages[slot, site])):
            a_unit, b_unit = tables.pages[slot, site, page].tolist()
            a_RI = _extent(tables, a_unit, RANKS_PER_PAGE * in_features).view(RANKS_PER_PAGE, in_features)
            b_RO = _extent(tables, b_unit, RANKS_PER_PAGE * out_features).view(RANKS_PER_PAGE, out_features)
            y_TO[t] += (a_RI @ x_TI[t].float() @ b_RO).to(y_TO.dtype)
        _add_bias(y_TO[t], tables, site, slot)


def embedding_add(
    y_TO: Tensor, token_ids_T: Tensor, tables: AdapterTables, site: int, slots_T: Tensor, vocab: int
) -> None:
    """y[t] += sum over the pages p of slot[t] at the embedding site of B_p^T A_p[token[t]]."""
    out_features = y_TO.shape[1]
    for t, slot in enumerate(slots_T.tolist()):
        if slot < 0:
            continue
        for page in range(int(tables.num_pages[slot, site])):
            a_unit, b_unit = tables.pages[slot, site, page].tolist()
            a_VR = _extent(tables, a_unit, vocab * RANKS_PER_PAGE).view(vocab, RANKS_PER_PAGE)
            b_RO = _extent(tables, b_unit, RANKS_PER_PAGE * out_features).view(RANKS_PER_PAGE, out_features)
            y_TO[t] += (a_VR[token_ids_T[t]] @ b_RO).to(y_TO.dtype)


def _extent(tables: AdapterTables, unit: int, num_elements: int) -> Tensor:
    return tables.arena[unit * UNIT : unit * UNIT + num_elements].float()


def _add_bias(y_O: Tensor, tables: AdapterTables, site: int, slot: int) -> None:
    unit = int(tables.bias[slot, site])
    if unit >= 0:
        y_O += _extent(tables, unit, y_O.shape[0]).to(y_O.dtype)


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
) -> Tensor:
    """Causal attention of each token over its own sequence's KV pages: softmax(scale q K^T) V.

    Pages hold [num_blocks, G, block_size, D]. Token t belongs to sequence sequence_T[t] and sees the keys at positions
    0..positions_T[t], of which only the last `sliding_window` if that is not 0. softcap: s = c tanh(s / c) (Gemma 2).
    """
    num_heads, num_kv_heads, block_size = q_THD.shape[1], k_pages_NGBD.shape[1], k_pages_NGBD.shape[2]
    out_THD = torch.empty_like(q_THD)
    for t in range(q_THD.shape[0]):
        end = int(positions_T[t]) + 1
        begin = max(0, end - sliding_window) if sliding_window else 0
        blocks = block_tables_SM[int(sequence_T[t]), : (end + block_size - 1) // block_size].long()
        keys = k_pages_NGBD[blocks].transpose(0, 1).flatten(1, 2)[:, begin:end].float()  # [G, L, D]
        values = v_pages_NGBD[blocks].transpose(0, 1).flatten(1, 2)[:, begin:end].float()
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=0)
        values = values.repeat_interleave(num_heads // num_kv_heads, dim=0)
        scores_HL = torch.einsum("hd,hld->hl", q_THD[t].float(), keys) * scale
        if softcap:
            scores_HL = softcap * torch.tanh(scores_HL / softcap)
        out_THD[t] = torch.einsum("hl,hld->hd", scores_HL.softmax(dim=-1), values).to(out_THD.dtype)
    return out_THD


def greedy(logits_LV: Tensor) -> Tensor:
    """[L] int64: of each row the lowest id of the largest logit, -1 for a row that is not finite."""
    largest_L1 = logits_LV.amax(dim=-1, keepdim=True)
    ids_L = (logits_LV == largest_L1).to(torch.int8).argmax(dim=-1)
    return torch.where(logits_LV.isfinite().all(dim=-1), ids_L, -1)


def write_kv(k_TGD: Tensor, v_TGD: Tensor, k_pages_NGBD: Tensor, v_pages_NGBD: Tensor, slot_mapping_T: Tensor) -> None:
    """Stores each token's key and value at its slot: block slot // block_size, offset slot % block_size."""
    block_size = k_pages_NGBD.shape[2]
    blocks_T, offsets_T = slot_mapping_T // block_size, slot_mapping_T % block_size
    k_pages_NGBD[blocks_T, :, offsets_T] = k_TGD.to(k_pages_NGBD.dtype)
    v_pages_NGBD[blocks_T, :, offsets_T] = v_TGD.to(v_pages_NGBD.dtype)


def int8_linear_weight_only(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """y = (x / input_scale) W'^T * absmax / 127 + bias in float32: W8A16, activations not quantised."""
    x_TI = x_TI.float()
    if input_scale_I is not None:
        x_TI = x_TI / input_scale_I
    y_TO = (x_TI @ weight_OI.float().t()) * (absmax_O / INT8_MAX)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def rms_norm(x_TI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), in float32 (Zhang and Sennrich 2019)."""
    x_TI = x_TI.float()
    return weight_I.float() * (x_TI * torch.rsqrt(x_TI.square().mean(dim=-1, keepdim=True) + eps))


def silu_mul(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """y = gate / (1 + exp(-gate)) * up, in float32: the inner part of a gated MLP (SwiGLU, Shazeer 2020)."""
    gate_TI = gate_TI.float()
    return gate_TI * torch.sigmoid(gate_TI) * up_TI.float()


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary position embedding of the first R widths, halves paired as transformers does: x cos + (-x2, x1) sin.

    In float32, rounded once to x's type; widths beyond R pass through.
    """
    rotary_width = cos_TR.shape[-1]
    x_THR = x_THD[..., :rotary_width].float()
    first_THR, second_THR = x_THR.chunk(2, dim=-1)
    turned_THR = torch.cat((-second_THR, first_THR), dim=-1)
    rotated_THR = x_THR * cos_TR.float()[:, None] + turned_THR * sin_TR.float()[:, None]
    return torch.cat((rotated_THR.to(x_THD.dtype), x_THD[..., rotary_width:]), dim=-1)
