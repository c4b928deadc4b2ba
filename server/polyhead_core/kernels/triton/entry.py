"""What dispatch.py calls on CUDA: the kernels under the reference's names, the fastest int8 product by measurement."""

from __future__ import annotations

from torch import Tensor

from polyhead_core.kernels.triton import tuning
from polyhead_core.kernels.triton.attention import paged_attention
from polyhead_core.kernels.triton.decoder import TritonDecoderStack
from polyhead_core.kernels.triton.logits import greedy
from polyhead_core.kernels.triton.low_rank import embedding_add, low_rank_add
from polyhead_core.kernels.triton.quantize import quantize_rows, rms_norm
from polyhead_core.kernels.triton.rotary import write_kv

__all__ = [
    "TritonDecoderStack",
    "embedding_add",
    "greedy",
    "int8_linear",
    "low_rank_add",
    "paged_attention",
    "rms_norm",
    "write_kv",
]


def int8_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    absmax_O: Tensor,
    input_scale_I: Tensor | None = None,
    outlier_columns_K: Tensor | None = None,
    outlier_weight_OK: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """See reference.int8_linear. Whichever product is chosen, the bits are the same."""
    rows = quantize_rows(x_TI, input_scale_I, outlier_columns_K)
    return tuning.w8a8_product(rows, weight_OI)(rows, weight_OI, absmax_O, outlier_weight_OK, bias_O)
