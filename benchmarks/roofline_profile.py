"""Where a decode step's time goes, kernel by kernel: torch's profiler, begun and ended on the engine's own thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from in_process import Answer, InProcessEngine
from torch.profiler import ProfilerActivity, profile

from polyhead_server.request import Event, TokensEvent


@dataclass(frozen=True, kw_only=True)
class Kernel:
    name: str
    calls_per_step: float
    self_s_per_step: float
    """Without what it calls in turn."""
    share: float
    """Of the step's wall time, profiler included."""


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    rows: int
    steps: int
    step_s: float
    """Wall time of a step while the profiler watched: longer than without it."""
    outside_s: float
    """Of it outside all of torch's operators: Python, the scheduler, delivery, the profiler itself."""
    kernels: tuple[Kernel, ...]
    layer_phases: dict[str, float]
    """Seconds a step in each phase of the fused decoder layers, which are one kernel above."""


class _Window:
    """Profiles `num_steps` steps from the `first`-th token of one watched request on.

    The profiler sees the thread that starts it alone, and events are delivered on the engine's thread: so the watched
    request's events start and stop it.
    """

    def __init__(self, engine: InProcessEngine, first: int, num_steps: int) -> None:
        self._take_layer_seconds = engine.engine.take_layer_seconds
        self.layer_phases: dict[str, float] = {}
        self._first = first
        self._num_steps = num_steps
        self._tokens = 0
        self._began_s = 0.0
        self.wall_s = 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_event(self, _: Answer, event: Event) -> None:
        if not isinstance(event, TokensEvent):
            return
        self._tokens += len(event.token_ids)
        if self._tokens == self._first:
            self._take_layer_seconds()
            self.profiler.start()
            self._began_s = time.perf_counter()
        elif self._tokens == self._first + self._num_steps:
            self.wall_s = time.perf_counter() - self._began_s
            self.profiler.stop()
            self.layer_phases = self._take_layer_seconds()


def profile_decode(
    engine: InProcessEngine, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], num_steps: int
) -> StepProfile:
    """Decodes one row for each prompt and profiles `num_steps` steps in which all of them are decoding."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass  # torch sets its profiler up on the main thread
    first = 4 + _prefill_steps(engine, prompts)
    window = _Window(engine, first, num_steps)
    answers = []
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        watch = window.on_event if index == 0 else None
        answers.append(
            engine.submit(prompt, adapter=adapter, on_event=watch, max_tokens=first + num_steps + 2, ignore_eos=True)
        )
    for answer in answers:
        answer.result()
    step_s = window.wall_s / num_steps
    averages: Any = window.profiler.key_averages()
    kernels = [
        Kernel(
            name=entry.key,
            calls_per_step=entry.count / num_steps,
            self_s_per_step=entry.self_cpu_time_total / 1e6 / num_steps,
            share=entry.self_cpu_time_total / 1e6 / window.wall_s,
        )
        for entry in averages
    ]
    kernels.sort(key=lambda kernel: kernel.self_s_per_step, reverse=True)
    return StepProfile(
        rows=len(prompts),
        steps=num_steps,
        step_s=step_s,
        outside_s=step_s - sum(kernel.self_s_per_step for kernel in kernels),
        kernels=tuple(kernels),
        layer_phases={name: seconds / num_steps for name, seconds in window.layer_phases.items()},
    )


def _prefill_steps(engine: InProcessEngine, prompts: Sequence[Sequence[int]]) -> int:
    """Steps until the last prompt is in, at most."""
    tokens = sum(len(prompt) for prompt in prompts)
    return -(-tokens // max(1, engine.config.max_batch_tokens - len(prompts))) + 1
