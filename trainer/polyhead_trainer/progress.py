"""Shows a running training: a live bar in a terminal, plain lines now and then elsewhere. Computes nothing."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.parallel.memory import peak_memory_bytes
from polyhead_trainer.utilization import Utilization

LINE_INTERVAL_S = 10.0
SMOOTHING = 0.9


class TrainingProgress:
    """Use as a context manager, and as a hook of the loop."""

    def __init__(self, console: Console, utilization: Utilization | None = None) -> None:
        """`utilization`: None where it cannot be told."""
        self._utilization = utilization
        self.history: list[StepReport] = []
        self._console = console
        self._smoothed_loss = 0.0
        self._num_before = 0
        """Steps of an earlier process, which this one's clock did not see."""
        self._started = self._last_line = time.monotonic()
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._bar.start()
        self._started = self._last_line = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [dataclasses.asdict(report) for report in self.history],
            "smoothed_loss": self._smoothed_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [StepReport(**report) for report in state["history"]]
        self._smoothed_loss = state["smoothed_loss"]
        self._num_before = len(self.history)

    def tensors(self, loop: TrainingLoop) -> dict[str, Tensor]:
        return {}

    @property
    def num_tokens(self) -> int:
        return sum(report.num_tokens for report in self.history)

    @property
    def tokens_per_s(self) -> float:
        seconds = sum(report.seconds for report in self.history)
        return self.num_tokens / seconds if seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of all steps so far."""
        return self._utilization.share(self.history) if self._utilization else None

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        first = not self.history
        self.history.append(report)
        self._smoothed_loss = report.loss if first else SMOOTHING * self._smoothed_loss + (1 - SMOOTHING) * report.loss
        text = f"loss {self._smoothed_loss:.4f}  {self.tokens_per_s:.0f} tokens/s"
        if self.mfu is not None:
            text += f"  MFU {self.mfu:.1%}"
        text += f"  peak memory {peak_memory_bytes(loop.device) / 2**30:.2f} GiB"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=report.step, total=report.num_steps, description=text)
            return
        now = time.monotonic()
        if first or report.step == report.num_steps or now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            seconds_a_step = (now - self._started) / (report.step - self._num_before)
            remaining = seconds_a_step * (report.num_steps - report.step)
            self._console.print(
                f"step {report.step}/{report.num_steps}  {text}  {remaining:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
