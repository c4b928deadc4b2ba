"""What every tracker provides to a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    @property
    def name(self) -> str: ...

    def begin(self, run_name: str, settings: Mapping[str, str], identity: str | None) -> str | None:
        """Opens the run, or with an `identity` that an earlier process got from here the same one again.

        Returns its identity, None where everything is to be told anew. Raises ConfigError.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Raises StorageFailed where the values go to the disk; what a network loses does not end a training."""

    def flush(self) -> None:
        """What was logged can be read by others after it. Raises as `log` does."""

    def end(self, *, finished: bool) -> None:
        """Once; nothing is logged after it. What it raises is logged."""
