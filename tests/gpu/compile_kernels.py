"""Compiles every kernel for a CUDA processor that is not there: launches only compile, and no kernel runs.

python compile_kernels.py CAPABILITY, without TRITON_INTERPRET and with tests/ in PYTHONPATH; prints the kernels' names.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

import kernel_cases
from decoder_cases import decoder_case
from polyhead_core.kernels.decoder import Activation
from polyhead_core.kernels.triton import attention, int8_linear, logits, low_rank, quantize, rotary, tuning
from polyhead_core.kernels.triton.decoder import TritonDecoderStack


class AbsentDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(compiled: set[str]) -> None:
    run = jit.JITFunction.run

    @functools.wraps(run)
    def compile_without_launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **rest: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **rest)
        assert kernel.asm["cubin"], self.__name__
        compiled.add(self.__name__)
        return kernel

    jit.JITFunction.run = compile_without_launch


def compile_all() -> None:
    generator = kernel_cases.seeded(0)
    layer = kernel_cases.random_layer(generator, 1024, 257)
    smoothed = kernel_cases.random_layer(generator, 513, 64)
    for rows in (1, 32, 64, 128):
        int8_linear.int8_linear(torch.randn(rows, 1024), *kernel_cases.int8_arguments(layer))
    int8_linear.int8_linear(torch.randn(1, 513), *kernel_cases.int8_arguments(smoothed))
    for dtype in (torch.float32, torch.bfloat16):
        compile_for(dtype, layer)


def compile_for(dtype: torch.dtype, layer: Any) -> None:
    x, slots, weight = torch.randn(64, 1024).to(dtype), torch.zeros(64, dtype=torch.int32), torch.ones(1024)
    int8_linear.int8_linear_weight_only(x, layer.weight, layer.SCB, None, layer.bias)
    rows = quantize.quantize_rows(x, None, layer.outlier_columns)
    int8_linear.int8_product_cublas(rows, layer.weight, layer.SCB, layer.outlier_weight, layer.bias)
    quantize.rms_norm_quantize(x, weight, 1e-5, weight, layer.outlier_columns, keep_x=True)
    for activation in Activation:
        quantize.gated_quantize(x, x, activation, weight, None, keep_x=True)
    tables = kernel_cases.random_tables(0, 1024, 256, dtype)
    for by_segment in (False, True):
        low_rank.low_rank_add(torch.zeros(64, 256, dtype=dtype), x, tables, 1, slots, by_segment=by_segment)
    low_rank.embedding_add(torch.zeros(64, 256, dtype=dtype), slots.long(), tables, 1, slots)
    q, pages = torch.randn(64, 32, 128).to(dtype), torch.randn(80, 8, 16, 128).to(dtype)
    blocks, positions = torch.zeros(8, 80, dtype=torch.int32), slots.long()
    for split, window, softcap, offsets in (
        (False, 0, 0.0, None), (False, 70, 0.0, slots[:8]), (True, 70, 5.0, slots[:8])
    ):  # fmt: skip
        attention.paged_attention(q, pages, pages, blocks, slots, positions, 0.1, window, softcap, offsets, split=split)
    k, angle = pages[:64, :, 0], torch.zeros(64, 128)
    rotary.rotary_write_kv(q, k, k, angle, angle, pages, pages, positions)
    rotary.write_kv(k, k, pages, pages, positions)
    logits.greedy(torch.zeros(8, 32000))


def compile_layers() -> None:
    """As the engine runs them on CUDA: pages in bfloat16, with adapters and without, every activation."""
    tuning.w8a8_product = lambda _rows, _weight: int8_linear.int8_product
    for seed, adapters in ((0, True), (1, False)):
        case = decoder_case(
            seed, torch.device("cpu"), adapters=adapters, head_norms=bool(seed), pages=torch.bfloat16
        )  # fmt: skip
        case.by(TritonDecoderStack(case.shape))


def main() -> None:
    driver.set_active(AbsentDevice(int(sys.argv[1])))
    compiled: set[str] = set()
    compile_only(compiled)
    compile_all()
    compile_layers()
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
