"""TensorBoard event files: in `<output>.tensorboard` while the run goes on, in `<output>/tensorboard` once it is done.

They are a copy of what the run knows: a continued run writes them anew from its checkpoint, so that nothing is missing
that a killed process had not flushed, and nothing is there twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead_trainer.storage import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PUBLISHED_FOLDER = "tensorboard"
FLUSH_S = 10
"""How old what a watcher sees may be."""
_PATTERN = "events.out.tfevents.*"


class EventFiles:
    """Implements Tracker."""

    name = "tensorboard"

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.tensorboard")
        self._writer: SummaryWriter | None = None

    def begin(self, run_name: str, settings: Mapping[str, str], identity: str | None) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        with writing(self.folder, "nothing was trained yet"):
            self._remove_files()
            self._writer = SummaryWriter(str(self.folder), flush_secs=FLUSH_S)
            # Indented by four, Markdown takes it for text to be shown as it is.
            self._writer.add_text("configuration", "\n".join(f"    {name} = {text}" for name, text in settings.items()))
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert self._writer is not None, "begin comes first"
        with writing(self.folder, "checkpoints stay as they are"):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        assert self._writer is not None, "begin comes first"
        with writing(self.folder, "checkpoints stay as they are"):
            self._writer.flush()

    def end(self, *, finished: bool) -> None:
        assert self._writer is not None, "begin comes first"
        with writing(self.folder, "checkpoints stay as they are"):
            self._writer.close()

    def publish(self, directory: Path) -> None:
        """Copies them into the finished run's folder, without the host's name in theirs."""
        target = directory / PUBLISHED_FOLDER
        target.mkdir()
        for number, file in enumerate(sorted(self.folder.glob(_PATTERN))):
            shutil.copyfile(file, target / f"events.out.tfevents.{number}")

    def remove(self) -> None:
        """Once the run's output is published."""
        self._remove_files()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove_files(self) -> None:
        """These alone: what somebody else has put there stays."""
        for file in self.folder.glob(_PATTERN):
            file.unlink()
