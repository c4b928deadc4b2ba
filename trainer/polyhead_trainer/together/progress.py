"""Shows a training of several adapters: a live bar for each in a terminal, plain lines elsewhere. Computes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polyhead_trainer.parallel.memory import peak_memory_bytes
from polyhead_trainer.progress import LINE_INTERVAL_S, TrainingProgress
from polyhead_trainer.report import say
from polyhead_trainer.together.loop import Course


class TogetherProgress:
    """Use as a context manager; implements RoundHook."""

    def __init__(self, console: Console, histories: dict[str, TrainingProgress]) -> None:
        """`histories`: what each adapter has done, by its name; hooks of their courses."""
        self._console = console
        self._histories = histories
        self._num_rounds = 0
        """Of this process."""
        self._started = time.monotonic()
        self._last_line = -LINE_INTERVAL_S
        columns = (
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._tasks = {name: self._bars.add_task("", total=None, name=name) for name in histories}

    def __enter__(self) -> TogetherProgress:
        if self._console.is_terminal:
            self._bars.start()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def after_round(self, courses: Sequence[Course]) -> None:
        self._num_rounds += 1
        memory = f"peak memory {peak_memory_bytes(courses[0].loop.device) / 2**30:.2f} GiB"
        if self._console.is_terminal:
            for course in courses:
                task, loop = self._tasks[course.member.name], course.loop
                text = f"{self._text(course)}  {memory}"
                self._bars.update(task, completed=loop.step, total=loop.num_steps, description=text)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_INTERVAL_S and not all(course.has_ended for course in courses):
            return
        self._last_line = now
        parts = [
            f"{course.member.name} {course.loop.step}/{course.loop.num_steps} {self._text(course)}"
            for course in courses
        ]
        num_left = max(0 if course.has_ended else course.loop.num_steps - course.loop.step for course in courses)
        remaining = (now - self._started) / self._num_rounds * num_left
        say(
            self._console,
            f"{'  '.join(parts)}  {self._tokens_per_s():.0f} tokens/s  {memory}  {remaining:.0f} s left",
        )

    def _text(self, course: Course) -> str:
        if course.failure is not None:
            return "diverged"
        history = self._histories[course.member.name].history
        return f"loss {history[-1].loss:.4f}" if history else ""

    def _tokens_per_s(self) -> float:
        histories = self._histories.values()
        seconds = sum(report.seconds for progress in histories for report in progress.history)
        return sum(progress.num_tokens for progress in histories) / seconds if seconds else 0.0
