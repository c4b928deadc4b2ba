"""The training loop: plain steps of an optimizer on float32 weights. Knows no files and no display."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from polyhead_trainer.activation_checkpointing import activation_checkpointing
from polyhead_trainer.batching import steps
from polyhead_trainer.compiled_layers import compiled_layers
from polyhead_trainer.config import TrainingSection
from polyhead_trainer.data import EncodedExample, ExampleStream
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.methods import Tuned, trained_parameters
from polyhead_trainer.neftune import noisy_embeddings
from polyhead_trainer.objectives import Objective
from polyhead_trainer.optimizers import make_optimizer
from polyhead_trainer.parallel import Parallel, Ranks, clip_grad_norm, micro_batches, without_backward
from polyhead_trainer.schedule import count_steps, learning_rate_factor

NAMED_EXAMPLES = 8
"""Most examples that an error names."""


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


class Hook(Protocol):
    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        """Called after every optimizer step; may call `loop.stop`."""


@runtime_checkable
class DivergenceHook(Hook, Protocol):
    def after_divergence(self, loop: TrainingLoop) -> None:
        """Called on all ranks where a step has diverged, before TrainingDiverged is raised."""


class TrainingLoop:
    """Owns the optimizer and the position in the data; what else a run does at its steps is done by hooks."""

    def __init__(
        self,
        tuned: Tuned,
        objective: Objective,
        examples: Sequence[EncodedExample] | ExampleStream,
        settings: TrainingSection,
        parallel: Parallel | None = None,
    ) -> None:
        """`parallel`: the tuned model on its ranks; all ranks get all examples, and take their share of each step."""
        self.tuned = tuned
        self.settings = settings
        self.num_steps = count_steps(settings, len(examples))
        self.step = 0
        """Optimizer steps done."""
        self.last_examples: Sequence[EncodedExample] = ()
        """Of the last of them that this process has done."""
        self.stopped_because: str | None = None
        self.optimizer = make_optimizer(tuned.parameter_groups(settings), settings)
        self._parallel = parallel or Parallel(Ranks(), tuned.model)
        self._objective = objective
        self._examples = examples
        self._parameters = list(trained_parameters(tuned.model).values())

    @property
    def device(self) -> torch.device:
        return self._parallel.device

    @property
    def ranks(self) -> Ranks:
        return self._parallel.ranks

    def stop(self, reason: str) -> None:
        """Ends the run after the current step; before the first one, without any."""
        self.stopped_because = reason

    def run(self, hooks: Sequence[Hook]) -> None:
        """Trains in place from `step` on. Raises TrainingDiverged."""
        self.tuned.model.train()
        with (
            compiled_layers(self.tuned.model, self.settings),
            activation_checkpointing(self.tuned.model, self.settings),
            noisy_embeddings(self.tuned.model, self.settings.neftune_alpha),
        ):
            self._run(hooks)
        self.tuned.model.eval()

    def _run(self, hooks: Sequence[Hook]) -> None:
        plan = self.plan()
        while self.stopped_because is None and (chosen := next(plan, None)) is not None:
            try:
                report = self._step(chosen)
            except TrainingDiverged:
                for hook in hooks:
                    if isinstance(hook, DivergenceHook):
                        hook.after_divergence(self)
                raise
            for hook in hooks:
                hook.after_step(self, report)

    def plan(self) -> Iterator[list[EncodedExample]]:
        """The examples of every step that is left."""
        return steps(
            self._examples,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            num_steps=self.num_steps,
            done=self.step,
        )

    def _step(self, chosen: Sequence[EncodedExample]) -> StepReport:
        started = time.perf_counter()
        micro_batch_size = self.settings.micro_batch_size or self.settings.batch_size
        loss = accumulate_gradients(self._parallel, self._objective, chosen, micro_batch_size)
        return self.finish_step(chosen, loss, started)

    def finish_step(self, chosen: Sequence[EncodedExample], loss: float, started: float) -> StepReport:
        """Clips the gradients that are there and takes the optimizer's step. Raises TrainingDiverged."""
        factor = learning_rate_factor(self.settings, self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        norm = clip_grad_norm(self._parameters, self.settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(chosen, loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.last_examples = chosen
        return StepReport(
            step=self.step,
            num_steps=self.num_steps,
            loss=loss,
            learning_rate=self.settings.learning_rate * factor,
            grad_norm=norm,
            num_tokens=sum(len(example) for example in chosen),
            num_labels=sum(example.num_labels for example in chosen),
            seconds=time.perf_counter() - started,
        )

    def _diverged(self, chosen: Sequence[EncodedExample], loss: float, norm: float) -> TrainingDiverged:
        """Names the examples whose loss alone is no number; where there are none, all of the step's."""
        with without_backward(self.tuned.model):
            losses = [
                self._objective.loss_sum(self._parallel.model, [example], self.device).item() for example in chosen
            ]
        culprits = [example for example, loss in zip(chosen, losses, strict=True) if not math.isfinite(loss)]
        named = [example.example.origin for example in culprits or chosen]
        more = f" and {len(named) - NAMED_EXAMPLES} more" if len(named) > NAMED_EXAMPLES else ""
        which = "no finite loss of their own" if culprits else "finite losses one by one"
        return TrainingDiverged(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}: not a number any more; try a smaller "
            f"training.learning_rate; of its {len(chosen)} examples these have {which}: "
            f"{', '.join(named[:NAMED_EXAMPLES])}{more}",
            step=self.step + 1,
            examples=chosen,
        )


def accumulate_gradients(
    model: nn.Module | Parallel, objective: Objective, examples: Sequence[EncodedExample], micro_batch_size: int
) -> float:
    """Adds the gradient of the mean loss over all units (label tokens) of `examples`; returns that loss.

    Every micro-batch is weighted by its units and not by its examples, so the result is the large batch's, on whatever
    number of ranks. `micro_batch_size` is a rank's.
    """
    parallel = model if isinstance(model, Parallel) else Parallel(Ranks(), model)
    ranks = parallel.ranks
    device = parallel.device
    num_units = objective.num_units(examples)
    total = torch.zeros((), device=device)
    parts = micro_batches(examples, micro_batch_size, ranks)
    for number, (part, weight) in enumerate(parts, start=1):
        with parallel.accumulating(last=number == len(parts)):
            loss = objective.loss_sum(parallel.model, part, device) * (weight / num_units)
            # DDP and FSDP take the mean over ranks, and the loss is a sum over them.
            (loss * ranks.size).backward()
        total += loss.detach()
    return ranks.sum(total.item())
