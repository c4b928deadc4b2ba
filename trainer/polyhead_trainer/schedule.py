"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from polyhead_trainer.config import TrainingSection


@dataclass(frozen=True, kw_only=True)
class _Position:
    """Within the steps after the warm-up."""

    done: float
    """Share of them that is behind, from 0 up to but without 1."""
    step: int
    """Of the whole run, from 0."""
    num_warmup: int
    settings: TrainingSection


def count_steps(settings: TrainingSection, num_examples: int) -> int:
    if settings.max_steps is not None:
        return settings.max_steps
    assert settings.epochs is not None
    return settings.epochs * math.ceil(num_examples / settings.batch_size)


def learning_rate_factor(settings: TrainingSection, step: int, num_steps: int) -> float:
    """Share of the peak rate in `step` (from 0): a linear rise, then the schedule's fall, which ends above 0."""
    num_warmup = math.ceil(settings.warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return _SCHEDULES[settings.schedule](_Position(done=done, step=step, num_warmup=num_warmup, settings=settings))


def _cosine(at: _Position) -> float:
    return 0.5 * (1 + math.cos(math.pi * at.done))


def _cosine_with_min(at: _Position) -> float:
    least = at.settings.min_learning_rate
    return least + (1 - least) * _cosine(at)


def _wsd(at: _Position) -> float:
    """Warm-up, stable, decay (Hu et al. 2024), the decay linear as in Hägele et al. 2024."""
    return min(1.0, (1 - at.done) / at.settings.decay) if at.settings.decay else 1.0


def _inverse_sqrt(at: _Position) -> float:
    """Vaswani et al. 2017, relative to the peak that the warm-up ended at."""
    return math.sqrt(max(1, at.num_warmup) / max(1, at.step + 1))


_SCHEDULES: dict[str, Callable[[_Position], float]] = {
    "cosine": _cosine,
    "linear": lambda at: 1 - at.done,
    "constant": lambda at: 1.0,
    "cosine-with-min": _cosine_with_min,
    "wsd": _wsd,
    "inverse-sqrt": _inverse_sqrt,
}
