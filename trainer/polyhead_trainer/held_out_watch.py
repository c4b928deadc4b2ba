"""Measures the held-out loss now and then while training: stops early, keeps the best weights. Saves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from polyhead_trainer.config import TrainingSection
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.methods import Tuned
from polyhead_trainer.parallel import without_backward
from polyhead_trainer.trained_state import copy_state, restore_state


class HeldOutLoss(Protocol):
    def held_out_loss(self, model: nn.Module) -> float:
        """Mean over the label tokens, in nats."""


@dataclass
class HeldOutWatch:
    """Implements Hook and Stateful. Without training.evaluate_every it does nothing."""

    evaluator: HeldOutLoss
    settings: TrainingSection
    say: Callable[[str], None] = lambda _: None
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, held-out loss) of every measurement."""
    best_step: int = 0
    best_loss: float = math.inf
    _best_state: dict[str, Tensor] | None = None

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        every = self.settings.evaluate_every
        if not every or (report.step % every and report.step != report.num_steps):
            return
        model = loop.tuned.model
        model.eval()
        with without_backward(model):
            loss = loop.ranks.from_main(self.evaluator.held_out_loss(model))  # one decision for all
        model.train()
        self.losses.append((report.step, loss))
        if loss < self.best_loss:
            self.best_step, self.best_loss = report.step, loss
            if self.settings.keep == "best":
                self._best_state = copy_state(loop.tuned, into=self._best_state)
        self.say(f"step {report.step}: held-out loss {loss:.4f}, best {self.best_loss:.4f} at step {self.best_step}")
        patience = self.settings.early_stopping_patience
        since_best = sum(step > self.best_step for step, _ in self.losses)
        if patience and since_best >= patience and report.step != report.num_steps:
            loop.stop(
                f"the held-out loss has not fallen for {since_best} measurements: {self.best_loss:.4f} at step "
                f"{self.best_step}, {loss:.4f} now"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = [(step, loss) for step, loss in state["losses"]]
        self.best_step, self.best_loss = state["best_step"], state["best_loss"]

    def tensors(self, loop: TrainingLoop) -> dict[str, Tensor]:
        if self.settings.keep != "best":
            return {}
        if self._best_state is None:
            self._best_state = copy_state(loop.tuned)
        return self._best_state

    def restore_best(self, tuned: Tuned) -> bool:
        """Puts the best weights back, with training.keep = best; tells whether those were not the last ones."""
        if self._best_state is None or not self.losses:
            return False
        restore_state(tuned, self._best_state)
        return self.best_step != self.losses[-1][0]
