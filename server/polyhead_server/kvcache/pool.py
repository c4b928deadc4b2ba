"""The memory of the paged KV cache: one pair of page tensors a layer. Whose block is whose, block_manager knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead_core.errors import ConfigError
from polyhead_core.kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Key/value heads and head width of each layer, in layer order."""

    layers: tuple[tuple[int, int], ...]
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        elements = sum(heads * width for heads, width in self.layers) * self.block_size
        return 2 * elements * self.dtype.itemsize


class KVPool:
    """`keys[layer]` and `values[layer]`, each [num_blocks, kv_heads, block_size, head_width]."""

    def __init__(self, shape: KVShape, max_bytes: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = max_bytes // shape.bytes_per_block
        if self.num_blocks < 1:
            raise ConfigError(
                f"kv_cache_bytes = {max_bytes} holds no block: one block of {shape.block_size} tokens takes "
                f"{shape.bytes_per_block} bytes"
            )
        try:
            memory = dispatch.zeros_for_long(self.num_bytes // shape.dtype.itemsize, shape.dtype, device)
        except RuntimeError as error:  # torch's for memory that is not there, on every device
            raise ConfigError(f"kv_cache_bytes = {max_bytes} cannot be had on {device}: lower it; {error}") from error
        of_layers = [self.num_blocks * heads * shape.block_size * width for heads, width in shape.layers]
        pieces: Iterator[Tensor] = iter(memory.split(of_layers * 2))

        def pages(heads: int, *block: int) -> Tensor:
            return next(pieces).view(self.num_blocks, heads, *block)

        size = shape.block_size
        if dispatch.keys_lie_transposed(device):
            self.keys = [pages(heads, width, size).transpose(2, 3) for heads, width in shape.layers]
        else:
            self.keys = [pages(heads, size, width) for heads, width in shape.layers]
        self.values = [pages(heads, size, width) for heads, width in shape.layers]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.shape.bytes_per_block
