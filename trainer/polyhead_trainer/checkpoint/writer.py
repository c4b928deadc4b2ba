"""Writes checkpoints while a loop runs, and puts a loop back to where one was written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from polyhead_trainer.checkpoint.directory import CheckpointDirectory
from polyhead_trainer.checkpoint.identity import RunIdentity
from polyhead_trainer.checkpoint.tensors import gather, load_into, put_back
from polyhead_trainer.config import CheckpointSection
from polyhead_trainer.errors import ResumeRefused
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.parallel import Ranks
from polyhead_trainer.storage import write_durably, writing

STATE_FILE = "polyhead_run.json"
SCHEMA = 3
"""Raise when a checkpoint's files change their meaning."""


class Stateful(Protocol):
    """A hook with a memory of its own, which must survive: the curve, the best loss so far."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def tensors(self, loop: TrainingLoop) -> dict[str, Tensor]:
        """What else it holds, by name: saved from these tensors, and loaded into them."""


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What a checkpoint holds beside tensors."""

    identity: RunIdentity
    before: Measures
    """The backbone, measured before the first step: not measured again."""
    step: int = 0
    train_seconds: float = 0.0
    num_ranks: int = 1
    stopped_because: str | None = None
    """As the loop's: why no step follows, though some are left."""
    hooks: dict[str, Any]
    """State of each Stateful by its name."""

    @classmethod
    def read(cls, directory: Path) -> SavedRun:
        """Raises ResumeRefused."""
        return read_state(directory, cls.of)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> SavedRun:
        identity, before = RunIdentity(**saved["identity"]), Measures(**saved["before"])
        return cls(**{**saved, "identity": identity, "before": before})

    def to_json(self) -> str:
        return state_text(asdict(self))


State = TypeVar("State")


def state_text(state: dict[str, Any]) -> str:
    """What STATE_FILE holds."""
    return json.dumps({"schema": SCHEMA, **state})


def read_state(directory: Path, make: Callable[[dict[str, Any]], State]) -> State:
    """`make` of what `state_text` was given. Raises ResumeRefused."""
    try:
        saved = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        if saved.pop("schema") != SCHEMA:
            raise ResumeRefused(f"{directory} was written by another version of the trainer")
        return make(saved)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeRefused(f"{directory / STATE_FILE} cannot be read: {error}") from error


class CheckpointWriter:
    """Writes one checkpoint after another, at most one of which is on its way to the disk.

    Tensors are copied when `save` is called; a checkpoint gets its name when all of it has been written, which is
    looked after in `poll`.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        settings: CheckpointSection,
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._ranks = ranks
        self._writing: tuple[int, Future[Any]] | None = None
        # Its own group: the thread that writes talks to the other ranks while the loop does so too.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    def is_due(self, step: int, last: bool) -> bool:
        """`last`: no step follows."""
        every = self._settings.every_steps
        return bool(every) and (step % every == 0 or (last and step > every))

    def save(self, step: int, state: str, tensors: dict[str, Any]) -> None:
        """`state`: the text of STATE_FILE. Raises StorageFailed."""
        self.wait()
        staging = self._directory.staging(step)
        with writing(self._directory.at(step), self._kept()):
            if self._ranks.is_main:
                self._directory.stage(step)
                write_durably(staging / STATE_FILE, state)
            self._ranks.barrier()
            future = async_save(
                tensors,
                storage_writer=FileSystemWriter(staging, single_file_per_rank=True, sync_files=True),
                process_group=self._group,
                no_dist=self._ranks.size == 1,
            )
        self._writing = (step, cast("Future[Any]", future))
        if not self._settings.asynchronous:
            self.wait()

    def poll(self) -> None:
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Until everything is written. Raises StorageFailed."""
        if self._writing is None:
            return
        step, future = self._writing
        self._writing = None
        with writing(self._directory.at(step), self._kept()):
            future.result()
            if self._ranks.is_main:
                self._directory.commit(step, self._settings.keep)

    def close(self) -> None:
        """At the end of the run, failed ones included: what is whole by then is kept, nothing half written stays."""
        if self._writing is not None:
            step, future = self._writing
            self._writing = None
            # The run's own error, if there is one, says more than that of a disk which fails here.
            with contextlib.suppress(OSError):
                if future.exception() is None and self._ranks.is_main:
                    self._directory.commit(step, self._settings.keep)
        if self._ranks.is_main:
            self._directory.discard_staging()

    def _kept(self) -> str:
        latest = self._directory.latest()
        return f"the last good checkpoint is {latest}" if latest else "no checkpoint had been written before"


class Checkpointer(CheckpointWriter):
    """A hook of the loop; the last one, so that what the others did after a step is in that step's checkpoint."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        settings: CheckpointSection,
        run: SavedRun,
        stateful: Mapping[str, Stateful],
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> None:
        super().__init__(directory, settings, ranks)
        self._run = run
        self._stateful = stateful

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self._run = replace(self._run, train_seconds=self._run.train_seconds + report.seconds)
        self.poll()
        last = report.step == report.num_steps or loop.stopped_because is not None
        if self.is_due(report.step, last):
            hooks = {name: hook.state_dict() for name, hook in self._stateful.items()}
            saved = replace(
                self._run,
                step=loop.step,
                num_ranks=self._ranks.size,
                stopped_because=loop.stopped_because,
                hooks=hooks,
            )
            self.save(
                loop.step, saved.to_json(), gather(loop, self._ranks.rank) | stateful_tensors(loop, self._stateful)
            )


def restore(checkpoint: Path, loop: TrainingLoop, stateful: Mapping[str, Stateful], ranks: Ranks) -> SavedRun:
    """Puts weights, optimizer, position and random numbers back to where `checkpoint` was written.

    With as many ranks as wrote it every random number that follows is the one that would have followed; with others
    each rank goes on with numbers of its own, which matters to dropout alone. Raises ResumeRefused.
    """
    saved = SavedRun.read(checkpoint)
    state = gather(loop, ranks.rank) | stateful_tensors(loop, stateful)
    if saved.num_ranks != ranks.size:
        del state[f"random-{ranks.rank}"]
    load_into(state, checkpoint, alone=ranks.size == 1)
    put_back(loop, state, ranks.rank)
    loop.step, loop.stopped_because = saved.step, saved.stopped_because
    for name, hook in stateful.items():
        hook.load_state_dict(saved.hooks[name])
    return saved


def stateful_tensors(loop: TrainingLoop, stateful: Mapping[str, Stateful]) -> dict[str, Any]:
    return {name: tensors for name, hook in stateful.items() if (tensors := hook.tensors(loop))}
