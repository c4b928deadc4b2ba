"""The definition of correct: every kernel as slow, obvious tensor code, which also runs where no faster path can.

Shapes: T tokens (rows), I input width, O output width, H query heads, G key/value heads, D head width, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, silu

from polyhead_core.kernels.decoder import Activation, DecoderLayer, DecoderShape, DecoderStep, Int8Group
from polyhead_core.kernels.draw import Draw
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables

INT8_MAX = 127.0
LEAST_EXPONENT = -87.0
"""Of a token's weight in a draw; below it the weight is 0, as float32 would have it a little later."""


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise absmax int8: q = round(x / a), a = max|x| / 127 (LLM.int8, Dettmers et al. 2022, without outliers).

    Returns q [T, I] int8 and a [T, 1] float32. A row of zeros gets a = 1e-12 and q = 0.
    """
    scale_T1 = (x_TI.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp_min(1e-12)
    return (x_TI / scale_T1).round().to(torch.int8), scale_T1


def int8_product(q_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """q W^T with int32 accumulation: exact, so a row's result never depends on the other rows."""
    if q_TI.device.type == "cpu":
        if q_TI.shape[1] == 1:  # torch 2.13 leaves such a product unwritten
            q_TI, weight_OI = _filled_up(q_TI, 1, 2), _filled_up(weight_OI, 1, 2)
        return torch._int_mm(q_TI, weight_OI.t())
    # cuBLAS wants more than 16 rows and widths that are multiples of 8; torch's own tests try inner widths of whole 16
    # bytes alone. Zeros add nothing to a sum of products.
    rows, out = q_TI.shape[0], weight_OI.shape[0]
    return torch._int_mm(_filled_up(q_TI, 32, 16), _filled_up(weight_OI, 8, 16).t())[:rows, :out]


def _filled_up(x_TI: Tensor, rows: int, width: int) -> Tensor:
    """x with zeros up to multiples of `rows` and `width`; x itself where nothing is missing, which pad would copy."""
    missing = (0, -x_TI.shape[1] % width, 0, -x_TI.shape[0] % rows)
    return pad(x_TI, missing) if any(missing) else x_TI


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
    key_offsets_S: Tensor | None = None,
) -> Tensor:
    """Causal attention of each token over its own sequence's KV pages: softmax(scale q K^T) V.

    Pages hold [num_blocks, G, block_size, D]. Token t belongs to sequence sequence_T[t] and sees the keys at positions
    0..positions_T[t], of which only the last `sliding_window` if that is not 0. softcap: s = c tanh(s / c) (Gemma 2).
    key_offsets_S, int32: where in its blocks a sequence has position 0; None: at their beginning. A prefix whose pages
    many sequences share, in front of their own, ends with a block so, whatever its length.
    """
    num_heads, num_kv_heads, block_size = q_THD.shape[1], k_pages_NGBD.shape[1], k_pages_NGBD.shape[2]
    out_THD = torch.empty_like(q_THD)
    for t in range(q_THD.shape[0]):
        offset = 0 if key_offsets_S is None else int(key_offsets_S[int(sequence_T[t])])
        end = offset + int(positions_T[t]) + 1
        begin = max(offset, end - sliding_window) if sliding_window else offset
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


def draw(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
    """A token for each row of float32 logits [V], which may hold minus infinity but for one."""
    return [_draw(logits_V, how) for logits_V, how in zip(rows, draws, strict=True)]


def _draw(logits_V: Tensor, how: Draw) -> int:
    exponents_V = (logits_V - logits_V.max()) / how.temperature
    weights_V = exponents_V.exp().where(exponents_V >= LEAST_EXPONENT, 0.0).double()
    ids_C = logits_V.argsort(descending=True, stable=True)
    if how.top_k:
        ids_C = ids_C[: how.top_k]
    if how.top_p < 1.0:
        cumulative_C = weights_V[ids_C].cumsum(0)
        ids_C = ids_C[cumulative_C - weights_V[ids_C] < how.top_p * cumulative_C[-1]]
    ids_C = ids_C.sort().values
    weights_C = weights_V[ids_C]
    cumulative_C = weights_C.where(weights_C >= torch.tensor(how.min_p, dtype=torch.float32), 0.0).cumsum(0)
    # Below the total, which none exceeds.
    target = torch.minimum(
        how.uniform * cumulative_C[-1], torch.nextafter(cumulative_C[-1], torch.zeros_like(cumulative_C[-1]))
    )
    return int(ids_C[torch.searchsorted(cumulative_C, target, right=True)])


def write_kv(k_TGD: Tensor, v_TGD: Tensor, k_pages_NGBD: Tensor, v_pages_NGBD: Tensor, slot_mapping_T: Tensor) -> None:
    """Stores each token's key and value at its slot: block slot // block_size, offset slot % block_size."""
    block_size = k_pages_NGBD.shape[2]
    blocks_T, offsets_T = slot_mapping_T // block_size, slot_mapping_T % block_size
    k_pages_NGBD[blocks_T, :, offsets_T] = k_TGD.to(k_pages_NGBD.dtype)
    v_pages_NGBD[blocks_T, :, offsets_T] = v_TGD.to(v_pages_NGBD.dtype)


def decoder_layer(
    shape: DecoderShape, layer: DecoderLayer, x_TH: Tensor, cos_TR: Tensor, sin_TR: Tensor, step: DecoderStep
) -> Tensor:
    """x + attention(norm(x)), then that + MLP(norm(of it)), in float32, with what the rows' adapters add at each site.

    Writes the rows' keys and values into the layer's pages first.
    """

    def product(group: Int8Group, x_TI: Tensor, *parts: tuple[int, int]) -> Tensor:
        """`parts`: site and width of each layer of the group."""
        columns_K = group.outlier_columns_K
        outlier_weight_OK = None if columns_K is None else group.weight_OI[:, columns_K]
        y_TO = int8_linear(
            x_TI, group.weight_OI, group.absmax_O, group.input_scale_I, columns_K, outlier_weight_OK, group.bias_O
        )
        for (site, _), y_part in zip(parts, y_TO.split([width for _, width in parts], dim=1), strict=True):
            low_rank_add(y_part, x_TI, step.tables, site, step.adapter_slots)
        return y_TO

    heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_width
    q_site, k_site, v_site, o_site, gate_site, up_site, down_site = layer.sites
    q_width, kv_width, inner = heads * width, kv_heads * width, layer.down.weight_OI.shape[1]

    normed_TH = rms_norm(x_TH, layer.input_norm_H, shape.eps)
    parts = (q_site, q_width), (k_site, kv_width), (v_site, kv_width)
    qkv_TO = product(layer.qkv, normed_TH, *parts).unflatten(1, (heads + 2 * kv_heads, width))
    q_THD, k_TGD, v_TGD = qkv_TO.split([heads, kv_heads, kv_heads], dim=1)
    if layer.q_norm_D.numel():
        q_THD, k_TGD = rms_norm(q_THD, layer.q_norm_D, shape.eps), rms_norm(k_TGD, layer.k_norm_D, shape.eps)
    q_THD, k_TGD = rotate(q_THD, cos_TR, sin_TR), rotate(k_TGD, cos_TR, sin_TR)
    write_kv(k_TGD, v_TGD, layer.key_pages_NGBD, layer.value_pages_NGBD, step.slot_mapping)
    attended_THD = paged_attention(
        q_THD, layer.key_pages_NGBD, layer.value_pages_NGBD, step.block_tables, step.sequence, step.positions,
        layer.scale, layer.sliding_window, layer.softcap, step.key_offsets,
    )  # fmt: skip
    x_TH = x_TH + product(layer.output, attended_THD.flatten(1), (o_site, shape.hidden))

    normed_TH = rms_norm(x_TH, layer.post_norm_H, shape.eps)
    gate_TI, up_TI = product(layer.gate_up, normed_TH, (gate_site, inner), (up_site, inner)).chunk(2, dim=1)
    return x_TH + product(layer.down, gated(gate_TI, up_TI, shape.activation), (down_site, shape.hidden))


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


def gated(gate_TI: Tensor, up_TI: Tensor, activation: Activation) -> Tensor:
    """y = activation(gate) * up, in float32: the inner part of a gated MLP (SwiGLU and GEGLU, Shazeer 2020)."""
    gate_TI = gate_TI.float()
    activated_TI = silu(gate_TI) if activation == Activation.SILU else gelu(gate_TI, approximate="tanh")
    return activated_TI * up_TI.float()


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
