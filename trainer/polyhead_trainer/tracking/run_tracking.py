"""Tells the trackers what a run does, step by step, and which of their runs it is. Knows none of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyhead_trainer.config import RunConfig, TrackingSection, flat_settings
from polyhead_trainer.errors import MissingExtra
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.tracking.mlflow import MlflowTracker
from polyhead_trainer.tracking.tracker import Tracker
from polyhead_trainer.tracking.weights_and_biases import WandbTracker

if TYPE_CHECKING:
    from polyhead_trainer.evaluate import Measures
    from polyhead_trainer.held_out_watch import HeldOutWatch

logger = logging.getLogger(__name__)

HELD_OUT = "held_out/loss"


def check_tracking(settings: TrackingSection) -> None:
    """Raises MissingExtra, before anything is loaded."""
    wanted = [("trainer", "tensorboard", "every run writes TensorBoard's event files")]
    wanted += [("mlflow", "mlflow", "tracking.mlflow = true")] if settings.mlflow else []
    wanted += [("wandb", "wandb", "tracking.wandb = true")] if settings.wandb else []
    for extra, package, reason in wanted:
        if find_spec(package) is None:
            raise MissingExtra(
                f"{reason}, and the package {package!r} is not installed: pip install 'polyhead[{extra}]'"
            )


def optional_trackers(settings: TrackingSection) -> list[Tracker]:
    """Those that were asked for; `check_tracking` comes first."""
    trackers: list[Tracker] = []
    if settings.mlflow:
        trackers.append(MlflowTracker())
    if settings.wandb:
        trackers.append(WandbTracker())
    return trackers


class RunTracking:
    """Implements Hook and Stateful; after the held-out watch and before the checkpoints among the hooks."""

    def __init__(self, trackers: Sequence[Tracker], watch: HeldOutWatch) -> None:
        self._trackers = trackers
        self._open: list[Tracker] = []
        """Those that have begun and were not told yet how the run has ended."""
        self._watch = watch
        self._identities: dict[str, str] = {}
        self._num_told = 0
        """Of the watch's measurements."""

    def begin(self, config: RunConfig, before: Measures, history: Sequence[StepReport]) -> None:
        """`history`: the steps of earlier processes; they are told to whom does not know them. Raises ConfigError."""
        held_out = dict(self._watch.losses)
        self._num_told = len(self._watch.losses)
        for tracker in self._trackers:
            known = self._identities.get(tracker.name)
            identity = tracker.begin(config.output.name, flat_settings(config), known)
            self._open.append(tracker)
            if identity is not None:
                self._identities[tracker.name] = identity
            if identity is not None and identity == known:
                continue
            tracker.log(_measures(before) | {HELD_OUT: before.held_out_loss}, 0)
            for report in history:
                held = {HELD_OUT: held_out[report.step]} if report.step in held_out else {}
                tracker.log(_step(report) | held, report.step)

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        new = self._watch.losses[self._num_told :]
        self._num_told += len(new)
        values = _step(report) | ({HELD_OUT: new[-1][1]} if new else {})
        for tracker in self._open:
            tracker.log(values, report.step)

    @contextmanager
    def failing_with(self) -> Iterator[None]:
        """The trackers' runs that are still open have failed where what is inside does, by Control-C or SIGTERM too."""
        try:
            yield
        except BaseException:
            self.fail()
            raise

    def measured(self, after: Measures, step: int) -> None:
        """The last that is logged: what is published of it is whole then."""
        for tracker in self._open:
            tracker.log(_measures(after), step)
            tracker.flush()

    def finish(self) -> None:
        """Once the run's output is published."""
        self._end(finished=True)

    def fail(self) -> None:
        self._end(finished=False)

    def _end(self, *, finished: bool) -> None:
        # Whatever one of them does, the others are told, a publication stands, and why a run has failed stays known.
        while self._open:
            tracker = self._open.pop(0)
            try:
                tracker.end(finished=finished)
            except Exception:
                how = "finished" if finished else "failed"
                logger.warning("%s was not told that the run has %s", tracker.name, how, exc_info=True)

    def state_dict(self) -> dict[str, Any]:
        return {"identities": self._identities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._identities = dict(state["identities"])

    def tensors(self, loop: TrainingLoop) -> dict[str, Tensor]:
        return {}


def _step(report: StepReport) -> dict[str, float]:
    return {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/grad_norm": report.grad_norm,
        "train/tokens_per_s": report.num_tokens / report.seconds,
    }


def _measures(measures: Measures) -> dict[str, float]:
    """Everything that was measured and is a number."""
    fields = dataclasses.asdict(measures)
    return {f"measures/{name}": value for name, value in fields.items() if isinstance(value, int | float)}
