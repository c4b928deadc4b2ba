"""How many steps a run takes, and the learning rate of each."""

from __future__ import annotations

import math

from polyhead_trainer.config import TrainingSection


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
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[settings.schedule]
