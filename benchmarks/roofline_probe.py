"""What this machine can do at most: bytes read from memory per second, and int8 products per second."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("roofline_probe.cpp")
INT8_SHAPES = ((128, 1024, 1024), (512, 2048, 2048), (1024, 4096, 4096))
"""(rows, in, out) of the products that are timed, small to large."""
MAX_PRODUCT_S = 0.5
"""Larger shapes are left out where a product would take longer: torch has no fast int8 product for every processor."""
_PRODUCTS = 10_000_000_000
"""Of each thread, in one measurement."""
_WORD_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    bytes_per_s: float
    """Median over the passes."""
    best_bytes_per_s: float
    array_bytes: int
    num_threads: int
    passes: int


@dataclass(frozen=True, kw_only=True)
class Int8Rate:
    """Operations per second; a multiplication and an addition are two."""

    in_registers: float
    """Of the processor's widest int8 product alone, median; what no kernel can exceed."""
    instruction: str
    torch_int_mm: dict[str, float]
    """What torch._int_mm reaches, by shape."""


def read_bandwidth(array_bytes: int, num_threads: int, passes: int) -> Bandwidth:
    """Of all threads together. Raises SystemExit where there is no C++ compiler."""
    num_words = array_bytes // _WORD_BYTES // (8 * num_threads) * (8 * num_threads)
    words = torch.empty(num_words, dtype=torch.int64)
    expected = num_words * (num_words - 1) // 2 % 2**64
    seconds = []
    library = _library()
    library.fill(words.data_ptr(), num_words, num_threads)
    total = ctypes.c_uint64()
    for _ in range(passes + 1):  # the first one warms the page tables
        seconds.append(library.read_once(words.data_ptr(), num_words, num_threads, ctypes.byref(total)))
        assert total.value == expected, "the array was not read as it was written"
    rates = [num_words * _WORD_BYTES / one for one in seconds[1:]]
    return Bandwidth(
        bytes_per_s=statistics.median(rates),
        best_bytes_per_s=max(rates),
        array_bytes=num_words * _WORD_BYTES,
        num_threads=num_threads,
        passes=passes,
    )


def int8_rate(num_threads: int, repeats: int) -> Int8Rate:
    """The processor's own rate, and torch's on shapes large enough to be bound by arithmetic."""
    library = _library()
    total = ctypes.c_int()
    rates = []
    per_round = library.int8_products_per_round()
    rounds = _PRODUCTS // per_round
    for _ in range(repeats):
        rates.append(2 * library.int8_products_per_s(rounds, num_threads, ctypes.byref(total)))
        assert total.value == _expected_total(rounds * per_round), "the products were left out"
    return Int8Rate(
        in_registers=statistics.median(rates),
        instruction=library.int8_instruction().decode(),
        torch_int_mm=_torch_rates(num_threads, repeats),
    )


def _expected_total(products: int) -> int:
    """Sum of as many times 3 * -2, in 32 bits."""
    return (products * -6 + 2**31) % 2**32 - 2**31


def _torch_rates(num_threads: int, repeats: int) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    rates: dict[str, float] = {}
    try:
        for rows, width, out in INT8_SHAPES:
            operations = 2 * rows * width * out
            if rates and operations / max(rates.values()) > MAX_PRODUCT_S:
                break
            rates[f"{rows} x {width} x {out}"] = operations / _product_s(rows, width, out, repeats)
    finally:
        torch.set_num_threads(before)
    return rates


def _product_s(rows: int, width: int, out: int, repeats: int) -> float:
    x_TI = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    weight_OI = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    seconds = []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        torch._int_mm(x_TI, weight_OI.t())
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def all_cores() -> int:
    return len(os.sched_getaffinity(0))


@cache
def _library() -> ctypes.CDLL:
    """Raises SystemExit where it cannot be built."""
    command = [cpp_extension.get_cxx_compiler(), "-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory(prefix="polyhead-roofline-") as folder:
        target = Path(folder) / "roofline_probe.so"
        try:
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(target)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise SystemExit(f"the roofline needs a C++ compiler: {command[0]}: {error}") from error
        if done.returncode != 0:
            raise SystemExit(f"the roofline's probe does not compile: {command[0]}: {done.stderr[-1000:]}")
        library = ctypes.CDLL(str(target))
    library.fill.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.fill.restype = None
    library.read_once.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    library.read_once.restype = ctypes.c_double
    library.int8_products_per_s.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    library.int8_products_per_s.restype = ctypes.c_double
    library.int8_instruction.restype = ctypes.c_char_p
    library.int8_products_per_round.restype = ctypes.c_int
    return library
