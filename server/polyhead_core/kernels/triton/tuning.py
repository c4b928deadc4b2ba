"""Which product with int8 weights is fastest, measured once per shape on this device and kept in a file.

Candidates of one family give the same bits, so choosing among them by the number of rows leaves a row independent of
its batch. Families differ: `w8a8` quantises activations, `w8a16` and `dequantized` do not. Serving chooses within
`w8a8` alone; the other times stand in the table for whoever chooses a family, which must then hold for every batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from polyhead_core.kernels.triton.int8_linear import (
    Tile,
    default_tile,
    int8_linear_weight_only,
    int8_product,
    int8_product_cublas,
)
from polyhead_core.kernels.triton.quantize import QuantizedRows, quantize_rows
from polyhead_core.paths import default_cache_dir

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows up to which a measurement counts; more rows count as the last bucket."""
_ROUNDS, _CALLS = 5, 10
_FLUSHED_BYTES = 128 << 20  # more than any device's L2: a layer's weights come from memory, as between two layers

W8A8Product = Callable[..., Tensor]
"""As int8_linear.int8_product."""

W8A8_TILES = (
    Tile(block_t=16, block_o=16, block_i=512, num_warps=4, num_stages=3),
    Tile(block_t=16, block_o=32, block_i=256, num_warps=4, num_stages=4),
    Tile(block_t=16, block_o=64, block_i=256, num_warps=4, num_stages=4),
    Tile(block_t=32, block_o=64, block_i=128, num_warps=4, num_stages=4),
    Tile(block_t=64, block_o=64, block_i=128, num_warps=4, num_stages=4),
    Tile(block_t=64, block_o=128, block_i=128, num_warps=4, num_stages=3),
    Tile(block_t=128, block_o=128, block_i=64, num_warps=8, num_stages=3),
    Tile(block_t=128, block_o=256, block_i=64, num_warps=8, num_stages=3),
)
W8A16_TILES = (
    Tile(block_t=16, block_o=16, block_i=256, num_warps=4, num_stages=3),
    Tile(block_t=16, block_o=32, block_i=128, num_warps=4, num_stages=4),
    Tile(block_t=64, block_o=64, block_i=64, num_warps=4, num_stages=3),
)


@dataclass(frozen=True, kw_only=True)
class ShapeKey:
    """What a choice depends on: the rows' bucket, the layer's widths, its outlier columns."""

    rows: int
    width: int
    outputs: int
    outliers: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.outputs}+{self.outliers}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    family: str
    name: str
    call: Callable[[], object]


def bucket(rows: int) -> int:
    return next((limit for limit in BUCKETS if rows <= limit), BUCKETS[-1])


def w8a8_product(rows: QuantizedRows, weight_OI: Tensor) -> W8A8Product:
    """The fastest product of family w8a8 for these rows: measured on first use; a default while a graph is captured."""
    num_rows = rows.q_TI.shape[0]
    outliers = 0 if rows.high_TK is None else rows.high_TK.shape[1]
    key = ShapeKey(rows=bucket(num_rows), width=weight_OI.shape[1], outputs=weight_OI.shape[0], outliers=outliers)
    table = TuningTable.of(weight_OI.device)
    if key not in table:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed now
            return partial(int8_product, tile=default_tile(num_rows))
        table.measure(key, w8a8_candidates(key, weight_OI.device))
    return _products()[table.fastest(key, "w8a8")]


@cache
def _products() -> dict[str, W8A8Product]:
    tiles: dict[str, W8A8Product] = {tile.name: partial(int8_product, tile=tile) for tile in W8A8_TILES}
    return tiles | {"cublas": int8_product_cublas}


def w8a8_candidates(key: ShapeKey, device: torch.device) -> list[Candidate]:
    """Each product of the family on random int8 rows and weights of the key's shape."""
    x_TI, weight_OI, absmax_O = _random_operands(key, device)
    columns_K = torch.arange(key.outliers, device=device) if key.outliers else None
    rows = quantize_rows(x_TI, None, columns_K)
    outlier_weight_OK = weight_OI[:, : key.outliers].contiguous() if key.outliers else None
    arguments = (rows, weight_OI, absmax_O, outlier_weight_OK, None)
    return [Candidate(family="w8a8", name=name, call=partial(call, *arguments)) for name, call in _products().items()]


def float_candidates(key: ShapeKey, device: torch.device) -> list[Candidate]:
    """The families that leave bfloat16 activations as they are: W8A16, and cuBLAS on a dequantised weight."""
    x_TI, weight_OI, absmax_O = _random_operands(key, device)
    x_TI = x_TI.bfloat16()
    dequantized_OI = (weight_OI.float() * (absmax_O / 127.0)[:, None]).bfloat16()
    candidates = [
        Candidate(
            family="w8a16",
            name=tile.name,
            call=partial(int8_linear_weight_only, x_TI, weight_OI, absmax_O, tile=tile),
        )
        for tile in W8A16_TILES
    ]
    matmul = partial(torch.nn.functional.linear, x_TI, dequantized_OI)
    return [*candidates, Candidate(family="dequantized", name="cublas-bf16", call=matmul)]


def _random_operands(key: ShapeKey, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x_TI = torch.randn(key.rows, key.width, device=device, generator=generator)
    weight_OI = torch.randint(-127, 128, (key.outputs, key.width), device=device, generator=generator)
    return x_TI, weight_OI.to(torch.int8), torch.rand(key.outputs, device=device, generator=generator) + 0.5


class TuningTable:
    """Median seconds of each candidate by shape; kept under the cache directory, by device, versions and source."""

    _tables: dict[str, TuningTable] = {}  # noqa: RUF012 - one for each device of the process

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, dict[str, dict[str, float]]] = _read(path)

    @classmethod
    def of(cls, device: torch.device) -> TuningTable:
        name = torch.cuda.get_device_name(device)
        if name not in cls._tables:
            cls._tables[name] = cls(default_cache_dir() / "tuning" / f"int8-{table_key(name)}.json")
        return cls._tables[name]

    def __contains__(self, key: ShapeKey) -> bool:
        return "w8a8" in self._seconds.get(str(key), {})

    def measure(self, key: ShapeKey, candidates: Sequence[Candidate]) -> None:
        """Times the candidates and keeps what came out, in memory and in the file."""
        times = time_alternating([candidate.call for candidate in candidates])
        families = self._seconds.setdefault(str(key), {})
        for candidate, seconds in zip(candidates, times, strict=True):
            if seconds is not None:
                families.setdefault(candidate.family, {})[candidate.name] = seconds
        self._write()

    def fastest(self, key: ShapeKey, family: str) -> str:
        times = self._seconds[str(key)][family]
        return min(times, key=times.__getitem__)

    def seconds(self, key: ShapeKey) -> dict[str, dict[str, float]]:
        """Family -> candidate -> median seconds."""
        return self._seconds[str(key)]

    def _write(self) -> None:
        """Moved into place, so that a reader never sees half a file. Of two writers the later one wins."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staged = self._path.with_suffix(f".{os.getpid()}.tmp")
        staged.write_text(json.dumps(self._seconds, indent=1, sort_keys=True), encoding="utf-8")
        staged.replace(self._path)


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        table: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("the tuning table %s cannot be read (%s): measuring again", path, error)
        return {}
    return table


def table_key(device_name: str) -> str:
    """Changes with the device, torch, triton, the candidates and the kernels' source."""
    digest = hashlib.sha256()
    for text in (device_name, torch.__version__, triton.__version__, *(str(asdict(t)) for t in W8A8_TILES)):
        digest.update(text.encode() + b"\0")
    for name in ("arithmetic", "quantize", "int8_linear", "tuning"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def time_alternating(calls: Sequence[Callable[[], object]]) -> list[float | None]:
    """Median seconds of each call on the current CUDA device, in rounds A B C A B C; None: too large for the device."""
    usable = [_runs(call) for call in calls]
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, runs, mine in zip(calls, usable, times, strict=True):
            if runs:
                mine.extend(_seconds_of(call, flushed) for _ in range(_CALLS))
    return [statistics.median(mine) if mine else None for mine in times]


def _seconds_of(call: Callable[[], object], flushed: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _runs(call: Callable[[], object]) -> bool:
    """Compiles it, too. A tile may want more shared memory than the device has."""
    try:
        call()
    except triton.runtime.errors.OutOfResources as error:
        logger.info("a candidate does not fit this device: %s", error)
        return False
    return True
