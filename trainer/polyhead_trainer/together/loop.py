"""The loop of several adapters: every round is one step of each adapter that has steps left, in shared passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from polyhead_trainer.activation_checkpointing import activation_checkpointing
from polyhead_trainer.compiled_layers import compiled_layers
from polyhead_trainer.config import TrainingSection
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.loop import Hook, TrainingLoop
from polyhead_trainer.together.model import Member, Share, SharedBackbone


@dataclass(kw_only=True)
class Course:
    """One adapter's way through its steps."""

    member: Member
    loop: TrainingLoop
    """Never run: it owns the optimizer, the data order and the schedule."""
    hooks: Sequence[Hook] = ()
    """Called with the adapter alone on the backbone."""
    keep_what_is_left: Callable[[TrainingDiverged], TrainingDiverged] = lambda error: error
    """Called with the adapter alone on the backbone when it diverges; gives the error to report."""
    failure: TrainingDiverged | None = None
    """Why it ended before its last step; the others went on."""
    _plan: Iterator[list[EncodedExample]] | None = None

    @property
    def micro_batch_size(self) -> int:
        return self.loop.settings.micro_batch_size or self.loop.settings.batch_size

    @property
    def has_ended(self) -> bool:
        finished = self.loop.step == self.loop.num_steps
        return finished or self.failure is not None or self.loop.stopped_because is not None

    def next_share(self) -> Share | None:
        """None where the course has ended."""
        if self.has_ended:
            return None
        if self._plan is None:
            self._plan = self.loop.plan()
        return Share(member=self.member, examples=next(self._plan), micro_batch_size=self.micro_batch_size)

    def finish_step(self, share: Share, loss: float, seconds: float) -> None:
        """`seconds`: what the passes are charged with."""
        try:
            report = self.loop.finish_step(share.examples, loss, time.perf_counter() - seconds)
        except TrainingDiverged as error:
            self.failure = self.keep_what_is_left(error)
            self.loop.optimizer.zero_grad(set_to_none=True)
            return
        for hook in self.hooks:
            hook.after_step(self.loop, report)


class RoundHook(Protocol):
    def after_round(self, courses: Sequence[Course]) -> None: ...


def train_together(
    shared: SharedBackbone, courses: Sequence[Course], settings: TrainingSection, hooks: Sequence[RoundHook] = ()
) -> None:
    """Trains all in place, each to its own last step. A course that diverges says so in `failure`; nothing is raised.

    `settings`: what they share. In a step's report the seconds of the passes are shared out by tokens.
    """
    model = shared.backbone.model
    with compiled_layers(model, settings), activation_checkpointing(model, settings):
        while True:
            found = [(course, course.next_share()) for course in courses]
            shares = [(course, share) for course, share in found if share is not None]
            if not shares:
                break
            _round(shared, shares)
            for hook in hooks:
                hook.after_round(courses)
    shared.backbone.model.eval()


def _round(shared: SharedBackbone, shares: Sequence[tuple[Course, Share]]) -> None:
    started = time.perf_counter()
    with shared.together():
        losses = shared.accumulate_gradients([share for _, share in shares])
    seconds = time.perf_counter() - started
    num_tokens = [sum(map(len, share.examples)) for _, share in shares]
    for (course, share), loss, tokens in zip(shares, losses, num_tokens, strict=True):
        with shared.only(course.member):
            course.finish_step(share, loss, seconds * tokens / sum(num_tokens))
