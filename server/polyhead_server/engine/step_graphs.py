"""Decode steps as CUDA graphs: recorded once for each size, then replayed as one launch, whatever adapters are in them.

A decode step has one token a row. Its rows are filled up to one of SIZES by copies of the last row, which write the
very keys and values that this row writes, and its block tables to a power of two of segments; so a few recordings serve
all steps. What a row's adapter is, the kernels read from the tables; a recording only fixes at which sites they look.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.engine.batch import StepBatch

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a recording; larger steps are not recorded."""
SEGMENT = 512
"""Tokens of the shortest block tables of a recording; the others are twice, four times ... as wide."""
_SPARE_BYTES = 256 << 20
"""With less of the device's memory left nothing more is recorded: steps that are not recorded need it."""

Forward = Callable[[StepBatch], Tensor]
Replay = Callable[[], Tensor]


class Recorder(Protocol):
    def record(self, run: Callable[[], Tensor]) -> Replay:
        """What computes again, at each call, what `run` computes from the tensors that it reads.

        Raises torch.OutOfMemoryError where there is no room for it, RuntimeError where `run` cannot be recorded; the
        caller's stream is the current one either way.
        """
        ...


class CudaRecorder:
    """Graphs of one memory pool, which leave their results at one place: these hold until the next replay of any."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call, unused-ignore]
        self._results: Tensor | None = None

    def record(self, run: Callable[[], Tensor]) -> Replay:
        self._check_room()
        # Once as it is: kernels are compiled and products measured, which a capture cannot hold.
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call, unused-ignore]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                logits = run()
            current.wait_stream(side)
            result = self._place_for(logits)
            graph = torch.cuda.CUDAGraph()
            # The loader's thread goes on copying adapters meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result.copy_(run())
        finally:
            # The context of a capture that was invalidated raises before it leaves the capture's stream.
            torch.cuda.set_stream(current)
            current.wait_stream(side)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _check_room(self) -> None:
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if free < _SPARE_BYTES:
            raise torch.OutOfMemoryError(f"{free >> 20} MiB of the device's memory are left")

    def _place_for(self, result: Tensor) -> Tensor:
        """Of the result's size; the recordings share it, so that logits of a large vocabulary are held once."""
        if self._results is None or self._results.numel() < result.numel():
            self._results = torch.empty(result.numel(), dtype=result.dtype, device=result.device)
        return self._results[: result.numel()].view(result.shape)


@dataclass(frozen=True)
class _Size:
    rows: int
    blocks: int
    adapted: bool


@dataclass(frozen=True)
class _Recording:
    inputs: StepBatch
    replay: Replay


class StepGraphs:
    def __init__(self, forward: Forward, recorder: Recorder, device: torch.device) -> None:
        self._forward = forward
        self._recorder = recorder
        self._device = device
        self._recordings: dict[_Size, _Recording] = {}
        self._sites: frozenset[int] = frozenset()
        """Sites at which any adapter has acted so far: where the recordings with adapters look."""
        self._tables: AdapterTables | None = None
        self._failed = False
        self._full = False
        """There was no room for a recording, and none of those there has been dropped since."""

    def fits(self, batch: StepBatch) -> bool:
        """Whether it is a decode step that can be recorded: one token a row, one row of logits each."""
        rows = batch.num_tokens
        return not self._failed and rows == len(batch.block_tables) == len(batch.logit_rows) and rows <= SIZES[-1]

    def __call__(self, batch: StepBatch) -> Tensor:
        """Logits [L, vocab] of a batch that fits, from host tensors; they hold until the next call."""
        if batch.tables is not self._tables:
            self._tables = batch.tables
            self._recordings.clear()
        if not batch.active_sites <= self._sites:
            self._sites |= batch.active_sites
            self._recordings = {size: one for size, one in self._recordings.items() if not size.adapted}
            self._full = False
        size = _Size(
            rows=next(rows for rows in SIZES if batch.num_tokens <= rows),
            blocks=_table_width(batch.block_tables.shape[1], batch.kv.shape.block_size),
            adapted=bool(batch.active_sites),
        )
        recording = self._recordings.get(size)
        if recording is None:
            recording = self._record(batch, size)
            if recording is None:
                return self._forward(batch.to(self._device))
        else:
            recording.inputs.take_over(self._padded(batch, size))
        return recording.replay()[: batch.num_tokens]

    def _record(self, batch: StepBatch, size: _Size) -> _Recording | None:
        """None where that fails, or there was no room for an earlier one."""
        if self._full:
            return None
        inputs = self._padded(batch, size).in_one_piece(self._device)
        try:
            recording = _Recording(inputs, self._recorder.record(lambda: self._forward(inputs)))
        except torch.OutOfMemoryError as error:
            logger.warning("no further decode steps are recorded as CUDA graphs: %s", error)
            self._full = True
            return None
        except RuntimeError as error:
            # A model may read a number from the device on the way, which no graph can hold.
            logger.warning("decode steps run without CUDA graphs: recording one failed (%s)", error)
            self._failed = True
            return None
        self._recordings[size] = recording
        return recording

    def _padded(self, batch: StepBatch, size: _Size) -> StepBatch:
        """The same step with `size` rows and blocks, on the host."""
        rows = torch.arange(size.rows)
        source = rows.clamp(max=batch.num_tokens - 1)
        tables = batch.block_tables.new_zeros(size.rows, size.blocks)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables[source]
        return dataclasses.replace(
            batch,
            token_ids=batch.token_ids[source],
            positions=batch.positions[source],
            sequence=rows.to(torch.int32),
            block_tables=tables,
            key_offsets=batch.key_offsets[source],
            slot_mapping=batch.slot_mapping[source],
            adapter_slots=batch.adapter_slots[source],
            logit_rows=batch.logit_rows[source],
            logit_slots=batch.logit_slots[source],
            active_sites=self._sites if size.adapted else frozenset(),
        )


def _table_width(num_blocks: int, block_size: int) -> int:
    tokens = SEGMENT
    while tokens < num_blocks * block_size:
        tokens *= 2
    return -(-tokens // block_size)
