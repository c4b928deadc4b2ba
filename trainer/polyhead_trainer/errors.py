"""The trainer's own branch of the error tree; the root is in polyhead_core.errors.

PolyheadError
├── ConfigError        polyhead_core: a setting that cannot be used
├── DataError          a training or evaluation file that cannot be used: names file, line and field
├── OutputExists       a finished run is there and `--overwrite` was not given
├── OutputBusy         another process is training into the same output
├── CheckpointExists   an unfinished run is there and `--resume` was not given
├── ResumeRefused      what is to be continued is another run: names what changed
├── StorageFailed      a checkpoint or the output could not be written: disk full, no permission
├── RankFailed         one of several processes died; the others were stopped
├── ConversionError    a checkpoint that cannot be converted: what was given, what was expected
├── MergeRefused       an adapter that cannot be merged into this backbone
├── DifferenceRefused  two models whose difference cannot be exported as an adapter
├── TrainingDiverged   the loss is not a number any more: carries the step and its examples
├── OutOfMemory        a run that does not fit: what it needs by part, and the settings that need less
└── MissingExtra       a package of the `trainer` extra is not installed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyhead_core.errors import PolyheadError

if TYPE_CHECKING:
    from polyhead_trainer.data import EncodedExample


class DataError(PolyheadError):
    reason = "DATA"


class OutputExists(PolyheadError):
    reason = "OUTPUT_EXISTS"


class OutputBusy(PolyheadError):
    reason = "OUTPUT_BUSY"


class CheckpointExists(PolyheadError):
    reason = "CHECKPOINT_EXISTS"


class ResumeRefused(PolyheadError):
    reason = "RESUME_REFUSED"


class StorageFailed(PolyheadError):
    reason = "STORAGE_FAILED"


class RankFailed(PolyheadError):
    reason = "RANK_FAILED"


class ConversionError(PolyheadError):
    reason = "CONVERSION"


class MergeRefused(PolyheadError):
    reason = "MERGE_REFUSED"


class DifferenceRefused(PolyheadError):
    reason = "DIFFERENCE_REFUSED"


class TrainingDiverged(PolyheadError):
    reason = "TRAINING_DIVERGED"

    def __init__(self, message: str, *, step: int = 0, examples: Sequence[EncodedExample] = ()) -> None:
        super().__init__(message)
        self.step = step
        """From 1; not taken. 0 where another process raised the error: its message alone has come here."""
        self.examples = examples
        """All of that step's; none where another process raised the error."""


class OutOfMemory(PolyheadError):
    reason = "OUT_OF_MEMORY"


class MissingExtra(PolyheadError):
    reason = "MISSING_EXTRA"
