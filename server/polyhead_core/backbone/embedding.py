"""An embedding table that is kept in its checkpoint's type and looked up into the activations' type."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CastEmbedding(nn.Embedding):
    """y = E[token], converted to `output_dtype`: a bfloat16 table need not be held in float32 for float32 layers."""

    def __init__(self, weight_VH: Tensor, output_dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(weight_VH.shape[0], weight_VH.shape[1], padding_idx=padding_idx, device="meta")
        self.weight = nn.Parameter(weight_VH, requires_grad=False)
        self.output_dtype = output_dtype

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(input, self.weight, self.padding_idx).to(self.output_dtype)
