"""Shows a training of several adapters: a live bar for each in a terminal, plain lines elsewhere. Computes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from polyhead_trainer.progress import LINE_INTERVAL_S, TrainingProgress
from polyhead_trainer.together.loop import Course


class TogetherProgress:
    """Use as a context manager; implements RoundHook."""

    def __init__(self, console: Console, histories: dict[str, TrainingProgress]) -> None:
        """`histories`: what each adapter has done, by its name; hooks of their courses."""
        self._console = console
        self._histories = histories
        self._last_line = -LINE_INTERVAL_S
        columns = (
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console)
        self._tasks = {name: self._bars.add_task("", total=None, name=name) for name in histories}

    def __enter__(self) -> TogetherProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def after_round(self, courses: Sequence[Course]) -> None:
        if self._console.is_terminal:
            for course in courses:
                task, loop = self._tasks[course.member.name], course.loop
                self._bars.update(task, completed=loop.step, total=loop.num_steps, description=self._text(course))
            return
        now = time.monotonic()
        if now - self._last_line < LINE_INTERVAL_S and not all(course.has_ended for course in courses):
            return
        self._last_line = now
        parts = [
            f"{course.member.name} {course.loop.step}/{course.loop.num_steps} {self._text(course)}"
            for course in courses
        ]
        self._console.print(
            f"{'  '.join(parts)}  {self._tokens_per_s():.0f} tokens/s", highlight=False, markup=False, soft_wrap=True
        )

    def _text(self, course: Course) -> str:
        if course.failure is not None:
            return "diverged"
        history = self._histories[course.member.name].history
        return f"loss {history[-1].loss:.4f}" if history else ""

    def _tokens_per_s(self) -> float:
        reports = [report for progress in self._histories.values() for report in progress.history]
        seconds = sum(report.seconds for report in reports)
        return sum(report.num_tokens for report in reports) / seconds if seconds else 0.0
