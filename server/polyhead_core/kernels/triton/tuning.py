"""Which product with int8 weights is fastest, measured once per shape on this device and kept in a file.

A candidate counts only if its result on the random operands of the measurement is the reference's.
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

from polyhead_core.kernels import reference
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
_EXACT_OUTPUTS = 512  # that are converted to float64 at a time
_FLOAT_TOLERANCE = 0.03  # of the largest result, for products with activations in bfloat16
_FLUSHED_BYTES = 128 << 20  # more than any device's L2: a layer's weights come from memory, as between two layers
_FLUSHES = 8  # a quarter of a millisecond, in which a call is launched: its time on the host is not counted

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
    call: Callable[[], Tensor]
    is_right: Callable[[Tensor], bool]
    """Whether this is what the call should have returned."""


def bucket(rows: int) -> int:
    return next((limit for limit in BUCKETS if rows <= limit), BUCKETS[-1])


def w8a8_product(rows: QuantizedRows, weight_OI: Tensor) -> W8A8Product:
    """The fastest product of family w8a8 for these rows, measured on first use.

    A default while a graph is captured, and where memory is too short for a measurement.
    """
    num_rows = rows.q_TI.shape[0]
    outliers = 0 if rows.high_TK is None else rows.high_TK.shape[1]
    key = ShapeKey(rows=bucket(num_rows), width=weight_OI.shape[1], outputs=weight_OI.shape[0], outliers=outliers)
    table = TuningTable.of(weight_OI.device)
    if key not in table and not torch.cuda.is_current_stream_capturing():  # while it captures nothing can be timed
        table.measure_w8a8(key, weight_OI.device)
    if key not in table:
        return partial(int8_product, tile=default_tile(num_rows))
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
    is_right = partial(torch.equal, _exact_product(rows, weight_OI, absmax_O, outlier_weight_OK))
    arguments = (rows, weight_OI, absmax_O, outlier_weight_OK, None)
    return [
        Candidate(family="w8a8", name=name, call=partial(call, *arguments), is_right=is_right)
        for name, call in _products().items()
    ]


def float_candidates(key: ShapeKey, device: torch.device) -> list[Candidate]:
    """The families that leave bfloat16 activations as they are: W8A16, and cuBLAS on a dequantised weight."""
    x_TI, weight_OI, absmax_O = _random_operands(key, device)
    x_TI = x_TI.bfloat16()
    dequantized_OI = (weight_OI.float() * (absmax_O / 127.0)[:, None]).bfloat16()
    is_right = partial(_is_close, reference.int8_linear_weight_only(x_TI, weight_OI, absmax_O))
    candidates = [
        Candidate(
            family="w8a16",
            name=tile.name,
            call=partial(int8_linear_weight_only, x_TI, weight_OI, absmax_O, tile=tile),
            is_right=is_right,
        )
        for tile in W8A16_TILES
    ]
    matmul = partial(torch.nn.functional.linear, x_TI, dequantized_OI)
    return [*candidates, Candidate(family="dequantized", name="cublas-bf16", call=matmul, is_right=is_right)]


def _random_operands(key: ShapeKey, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x_TI = torch.randn(key.rows, key.width, device=device, generator=generator)
    weight_OI = torch.randint(
        -127, 128, (key.outputs, key.width), dtype=torch.int8, device=device, generator=generator
    )  # fmt: skip
    return x_TI, weight_OI, torch.rand(key.outputs, device=device, generator=generator) + 0.5


def _exact_product(
    rows: QuantizedRows, weight_OI: Tensor, absmax_O: Tensor, outlier_weight_OK: Tensor | None
) -> Tensor:
    """What reference.int8_linear makes of rows that are quantised already, bit for bit on every device.

    Its sums are taken in float64, which is exact and shares nothing with a candidate; and CUDA divides a tensor by a
    number with an error, but not by a tensor.
    """

    def sums(q_TI: Tensor, weight_OI: Tensor) -> Tensor:
        q_TI = q_TI.double()
        parts = [q_TI @ part_OI.double().t() for part_OI in weight_OI.split(_EXACT_OUTPUTS)]
        return torch.cat([part_TO.float() for part_TO in parts], dim=1)

    y_TO = sums(rows.q_TI, weight_OI) * rows.scale_T[:, None]
    for q_TK, scale_T in ((rows.high_TK, rows.high_scale_T), (rows.low_TK, rows.low_scale_T)):
        if q_TK is not None:
            assert scale_T is not None
            assert outlier_weight_OK is not None
            y_TO += sums(q_TK, outlier_weight_OK) * scale_T[:, None]
    return y_TO * (absmax_O / torch.full_like(absmax_O, reference.INT8_MAX))


def _is_close(expected_TO: Tensor, found_TO: Tensor) -> bool:
    return bool((found_TO.float() - expected_TO).abs().max() <= _FLOAT_TOLERANCE * expected_TO.abs().max())


class TuningTable:
    """Median seconds of each candidate by shape; kept under the cache directory, by device, versions and source."""

    _tables: dict[str, TuningTable] = {}  # noqa: RUF012 - one for each device of the process

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, dict[str, dict[str, float]]] = _read(path)
        self._given_up: set[ShapeKey] = set()
        """Shapes of which a measurement brought nothing; this process does not try again."""

    @classmethod
    def of(cls, device: torch.device) -> TuningTable:
        name = torch.cuda.get_device_name(device)
        if name not in cls._tables:
            cls._tables[name] = cls(default_cache_dir() / "tuning" / f"int8-{table_key(name)}.json")
        return cls._tables[name]

    def __contains__(self, key: ShapeKey) -> bool:
        return "w8a8" in self._seconds.get(str(key), {})

    def measure(self, key: ShapeKey, candidates: Sequence[Candidate]) -> None:
        """Times the candidates that are right and keeps what came out, in memory and in the file."""
        right = [candidate for candidate in candidates if _is_right(candidate, key)]
        times = time_alternating([candidate.call for candidate in right])
        families = self._seconds.setdefault(str(key), {})
        for candidate, seconds in zip(right, times, strict=True):
            if seconds is not None:
                families.setdefault(candidate.family, {})[candidate.name] = seconds
        self._write()

    def measure_w8a8(self, key: ShapeKey, device: torch.device) -> None:
        """Measures the family; afterwards the shape is missing where memory was too short for it, or nothing right."""
        if key in self._given_up:
            return
        try:
            self.measure(key, w8a8_candidates(key, device))
        except torch.OutOfMemoryError as error:
            logger.info("no memory to measure the products of %s: %s", key, error)
        if key not in self:
            logger.warning("the products of %s could not be measured: a default serves", key)
            self._given_up.add(key)

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
    """Median seconds of each call on the current CUDA device; None: too large for the device."""
    return [statistics.median(mine) if mine else None for mine in sample_alternating(calls)]


def sample_alternating(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call on the current CUDA device, in rounds A B C A B C; none: too large for the device."""
    usable = [_runs(call) for call in calls]
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, runs, mine in zip(calls, usable, times, strict=True):
            if runs:
                mine.extend(_seconds_of(call, flushed) for _ in range(_CALLS))
    return times


def _seconds_of(call: Callable[[], object], flushed: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(_FLUSHES):
        flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _runs(call: Callable[[], object]) -> bool:
    """Compiles it, too. A tile may want more shared memory than the device has, a copy more memory than is left, and
    a compiler or cuBLAS may refuse a shape: what fails is left out, and the others are measured."""
    try:
        call()
    except (triton.runtime.errors.OutOfResources, torch.OutOfMemoryError) as error:
        logger.info("a candidate does not fit this device: %s", error)
        return False
    except (triton.TritonError, RuntimeError) as error:
        logger.warning("a candidate fails on this device: %s", error)
        return False
    return True


def _is_right(candidate: Candidate, key: ShapeKey) -> bool:
    verdicts: list[bool] = []
    if not _runs(lambda: verdicts.append(candidate.is_right(candidate.call()))):
        return False
    if not verdicts[0]:
        logger.warning("%s %s is wrong for %s on this device: never chosen", candidate.family, candidate.name, key)
    return verdicts[0]
