"""torch.profiler over some of a run's steps, where that is asked for: a trace for a viewer, and where the time goes.

Beside the output, in `<output>.profile`: a trace is many times as large as an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import ProfileSection
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.storage import writing

if TYPE_CHECKING:
    from polyhead_trainer.together.loop import Course


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """What one operator took of a mean step, without the operators that it calls; on a GPU of its time."""

    name: str
    calls: float
    seconds: float
    share: float
    """Of all operators' time."""


class StepProfiler:
    """Implements Hook and RoundHook, the last of them; a context around the loop. Idle with profile.steps = 0."""

    def __init__(self, settings: ProfileSection, output: Path, device: torch.device, rank: int = 0) -> None:
        self.folder = output.with_name(f"{output.name}.profile")
        self.operators: list[OperatorTime] = []
        """Most time first; empty until the profiled steps are done."""
        self._settings = settings
        self._device = device
        self._trace = self.folder / f"rank{rank}.pt.trace.json.gz"
        self._num_done = 0
        self._running: profile | None = None

    def check(self, num_steps: int) -> None:
        """Raises ConfigError where none of the steps that are to be done would be profiled."""
        if self._settings.steps and num_steps <= self._settings.after:
            raise ConfigError(
                f"profile.after = {self._settings.after}: the run has {num_steps} steps to do, so that none would be "
                "profiled; set a smaller one, or profile.steps = 0"
            )

    def __enter__(self) -> Self:
        self._move_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._running is not None and kind is None:
            self._finish()
        elif self._running is not None:
            self._running.stop()

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self._num_done += 1
        self._move_on()

    def after_round(self, courses: Sequence[Course]) -> None:
        self._num_done += 1
        self._move_on()

    def _move_on(self) -> None:
        if self._running is not None and self._num_done == self._settings.after + self._settings.steps:
            self._finish()
        elif self._settings.steps and self._num_done == self._settings.after:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, profile_memory=self._settings.memory)
            self._running.start()

    def _finish(self) -> None:
        assert self._running is not None
        finished, self._running = self._running, None
        finished.stop()
        self.operators = _operator_times(finished.key_averages(), self._num_done - self._settings.after, self._device)
        with writing(self.folder, "checkpoints stay as they are"):
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self._trace))


def _operator_times(events: Any, num_steps: int, device: torch.device) -> list[OperatorTime]:
    def seconds(event: Any) -> float:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        return float(own) / 1e6 / num_steps

    total = sum(map(seconds, events)) or 1.0
    found = [
        OperatorTime(name=e.key, calls=e.count / num_steps, seconds=seconds(e), share=seconds(e) / total)
        for e in events
    ]
    return sorted((one for one in found if one.seconds), key=lambda one: -one.seconds)
