"""Checkpoints of several adapters in one: all of them after the same round, so that what follows is the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyhead_trainer.checkpoint import CheckpointDirectory, RunIdentity, SavedRun, Stateful
from polyhead_trainer.checkpoint.tensors import gather, load_into, put_back
from polyhead_trainer.checkpoint.writer import CheckpointWriter, read_state, state_text, stateful_tensors
from polyhead_trainer.config import CheckpointSection
from polyhead_trainer.energy import EnergyMeter
from polyhead_trainer.errors import ResumeRefused, TrainingDiverged
from polyhead_trainer.together.loop import Course
from polyhead_trainer.together.model import SharedBackbone

RANDOM = "random-0"
"""The process's own random numbers, of which a run in mixed batches takes none."""


@dataclass(frozen=True, kw_only=True)
class SavedTogether:
    """What a checkpoint holds beside tensors."""

    round: int
    adapters: dict[str, SavedRun]
    failures: dict[str, str]
    """Messages of the adapters that had diverged."""
    energy: dict[str, Any]
    """State of the EnergyMeter, which measures all of them at once."""

    @classmethod
    def read(cls, directory: Path) -> SavedTogether:
        """Raises ResumeRefused."""
        return read_state(directory, cls._of)

    @classmethod
    def _of(cls, saved: dict[str, Any]) -> SavedTogether:
        adapters = {name: SavedRun.of(run) for name, run in saved["adapters"].items()}
        return cls(**{**saved, "adapters": adapters})

    def check_continues(self, identities: Mapping[str, RunIdentity], origin: Path) -> list[str]:
        """As RunIdentity's. Raises ResumeRefused, with what changed."""
        if list(identities) != list(self.adapters):
            raise ResumeRefused(
                f"{origin} belongs to another run: its [[adapters]] were {', '.join(self.adapters)}, and are "
                f"{', '.join(identities)}. Set back what changed, or choose another output, or delete the checkpoints "
                "to start anew"
            )
        return [
            f"{name}: {remark}"
            for name, identity in identities.items()
            for remark in identity.check_continues(self.adapters[name].identity, f"{origin}, adapter {name},")
        ]


class TogetherCheckpointer(CheckpointWriter):
    """Implements RoundHook; the last one."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        settings: CheckpointSection,
        shared: SharedBackbone,
        saved: SavedTogether,
        stateful: Mapping[str, Mapping[str, Stateful]],
        energy: EnergyMeter,
    ) -> None:
        """`saved`: as the run began, or was continued; `stateful`: by the adapter's name."""
        super().__init__(directory, settings)
        self._shared = shared
        self._saved = saved
        self._stateful = stateful
        self._energy = energy
        self._round = saved.round

    def after_round(self, courses: Sequence[Course]) -> None:
        self._round += 1
        self.poll()
        if self.is_due(self._round, last=all(course.has_ended for course in courses)):
            tensors = {course.member.name: self._tensors(course) for course in courses}
            self.save(self._round, state_text(asdict(self._state(courses))), tensors)

    def _state(self, courses: Sequence[Course]) -> SavedTogether:
        adapters = {}
        for course in courses:
            name = course.member.name
            hooks = {hook: stateful.state_dict() for hook, stateful in self._stateful[name].items()}
            before = self._saved.adapters[name]
            adapters[name] = SavedRun(
                identity=before.identity,
                before=before.before,
                step=course.loop.step,
                stopped_because=course.loop.stopped_because,
                hooks=hooks,
            )
        failures = {course.member.name: course.failure.message for course in courses if course.failure is not None}
        return SavedTogether(round=self._round, adapters=adapters, failures=failures, energy=self._energy.state_dict())

    def _tensors(self, course: Course) -> dict[str, Any]:
        with self._shared.only(course.member):
            return _gather(course, self._stateful[course.member.name])


def restore_together(
    checkpoint: Path,
    shared: SharedBackbone,
    courses: Sequence[Course],
    stateful: Mapping[str, Mapping[str, Stateful]],
    energy: EnergyMeter,
) -> SavedTogether:
    """Puts every adapter back to where `checkpoint` was written. Raises ResumeRefused."""
    saved = SavedTogether.read(checkpoint)
    state = {}
    for course in courses:
        with shared.only(course.member):
            state[course.member.name] = _gather(course, stateful[course.member.name])
    load_into(state, checkpoint)
    energy.load_state_dict(saved.energy)
    for course in courses:
        name = course.member.name
        with shared.only(course.member):
            put_back(course.loop, state[name], rank=0)
        course.member.dropout.set_state(state[name]["dropout"])
        course.loop.step = saved.adapters[name].step
        course.loop.stopped_because = saved.adapters[name].stopped_because
        for hook, one in stateful[name].items():
            one.load_state_dict(saved.adapters[name].hooks[hook])
        if name in saved.failures:
            course.failure = TrainingDiverged(saved.failures[name], step=course.loop.step + 1, examples=[])
    return saved


def _gather(course: Course, stateful: Mapping[str, Stateful]) -> dict[str, Any]:
    found = gather(course.loop, rank=0) | stateful_tensors(course.loop, stateful)
    del found[RANDOM]
    return {**found, "dropout": course.member.dropout.get_state()}
