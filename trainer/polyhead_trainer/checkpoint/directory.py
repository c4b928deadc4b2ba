"""`<output>.checkpoints`: complete `step-N` folders, and at most one that is being written. Knows no torch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from polyhead_trainer.errors import CheckpointExists
from polyhead_trainer.storage import sync_directory

_COMPLETE = re.compile(r"step-(\d+)")
_STAGING_PREFIX = ".writing-"


class CheckpointDirectory:
    """A name `step-N` appears by one rename, after all of it is on the disk: whatever is seen under it is whole."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.checkpoints")

    def steps(self) -> list[int]:
        """Of the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_COMPLETE.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def at(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def staging(self, step: int) -> Path:
        return self.path / f"{_STAGING_PREFIX}{step}"

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.at(steps[-1]) if steps else None

    def check_fresh(self) -> None:
        """Raises CheckpointExists where a run that was not finished could be continued."""
        latest = self.latest()
        if latest is not None:
            raise CheckpointExists(
                f"{latest} is there, of a run that was not finished: continue it with --resume, or delete {self.path} "
                "to start anew"
            )

    def stage(self, step: int) -> None:
        """Makes the folder `staging(step)` to be filled; what a killed process left half written goes."""
        self.discard_staging()
        self.staging(step).mkdir(parents=True)

    def commit(self, step: int, keep: int) -> None:
        """Shows the filled folder as `step-N` and removes the oldest ones beyond `keep`."""
        staging = self.staging(step)
        sync_directory(staging)
        shutil.rmtree(self.at(step), ignore_errors=True)
        staging.rename(self.at(step))
        sync_directory(self.path)
        for old in self.steps()[:-keep]:
            # Renamed first: a kill in the middle of the removal must not leave a `step-N` with files missing.
            doomed = self.path / f"{_STAGING_PREFIX}old-{old}"
            self.at(old).rename(doomed)
            shutil.rmtree(doomed)

    def discard_staging(self) -> None:
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if entry.name.startswith(_STAGING_PREFIX):
                    shutil.rmtree(entry, ignore_errors=True)

    def remove(self) -> None:
        """All of it, once the run's output is published."""
        shutil.rmtree(self.path, ignore_errors=True)
