"""The training loop: plain steps of AdamW on float32 adapter weights. Knows no files and no display."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead_trainer.batching import collate, steps
from polyhead_trainer.config import TrainingSection
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.loss import loss_sum


@dataclass(frozen=True, kw_only=True)
class StepReport:
    step: int
    """From 1."""
    num_steps: int
    loss: float
    """Mean over the step's label tokens."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Tokens of the step without padding, prompts included."""
    num_labels: int
    seconds: float


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


def train(
    model: nn.Module,
    examples: Sequence[EncodedExample],
    settings: TrainingSection,
    *,
    pad_id: int,
    on_step: Callable[[StepReport], None],
) -> None:
    """Trains the parameters that require gradients, in place. Raises TrainingDiverged."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    num_steps = count_steps(settings, len(examples))
    plan = steps(examples, batch_size=settings.batch_size, seed=settings.seed, num_steps=num_steps)
    model.train()
    for step, chosen in enumerate(plan):
        started = time.perf_counter()
        rate = settings.learning_rate * learning_rate_factor(settings, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = accumulate_gradients(model, chosen, settings.micro_batch_size or settings.batch_size, pad_id)
        norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        if not math.isfinite(loss) or not torch.isfinite(norm):
            origins = ", ".join(example.example.origin for example in chosen)
            raise TrainingDiverged(
                f"step {step + 1}: loss {loss}, gradient norm {norm.item()}: not a number any more; try a smaller "
                f"training.learning_rate; the step's examples: {origins}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(
            StepReport(
                step=step + 1,
                num_steps=num_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm.item(),
                num_tokens=sum(len(example) for example in chosen),
                num_labels=sum(example.num_labels for example in chosen),
                seconds=time.perf_counter() - started,
            )
        )
    model.eval()


def accumulate_gradients(
    model: nn.Module, examples: Sequence[EncodedExample], micro_batch_size: int, pad_id: int
) -> float:
    """Adds the gradient of the mean loss over all label tokens of `examples`; returns that loss.

    Every micro-batch is weighted by its label tokens and not by its examples, so the result is the large batch's.
    """
    device = next(model.parameters()).device
    num_labels = sum(example.num_labels for example in examples)
    total: Tensor | float = 0.0
    for start in range(0, len(examples), micro_batch_size):
        batch = collate(examples[start : start + micro_batch_size], pad_id).to(device)
        loss = loss_sum(model, batch) / num_labels
        loss.backward()
        total = total + loss.detach()
    return float(total)
