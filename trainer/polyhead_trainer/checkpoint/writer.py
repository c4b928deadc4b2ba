"""Writes checkpoints while a loop runs, and puts a loop back to where one was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from polyhead_trainer.checkpoint.directory import CheckpointDirectory
from polyhead_trainer.checkpoint.identity import RunIdentity
from polyhead_trainer.checkpoint.tensors import gather, put_back
from polyhead_trainer.config import CheckpointSection
from polyhead_trainer.errors import ResumeRefused
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.parallel import Ranks
from polyhead_trainer.storage import write_durably, writing

STATE_FILE = "polyhead_run.json"
SCHEMA = 2
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
    hooks: dict[str, Any]
    """State of each Stateful by its name."""

    @classmethod
    def read(cls, directory: Path) -> SavedRun:
        """Raises ResumeRefused."""
        try:
            saved = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
            if saved.pop("schema") != SCHEMA:
                raise ResumeRefused(f"{directory} was written by another version of the trainer")
            saved["identity"] = RunIdentity(**saved["identity"])
            saved["before"] = Measures(**saved["before"])
            return cls(**saved)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeRefused(f"{directory / STATE_FILE} cannot be read: {error}") from error

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)})


class Checkpointer:
    """A hook of the loop; the last one, so that what the others did after a step is in that step's checkpoint.

    At most one checkpoint is on its way to the disk. Its tensors are copied when it is due, and it gets its name when
    all of it has been written, which is looked after at the next step.
    """

    def __init__(
        self,
        directory: CheckpointDirectory,
        settings: CheckpointSection,
        run: SavedRun,
        stateful: Mapping[str, Stateful],
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._run = run
        self._stateful = stateful
        self._ranks = ranks
        self._writing: tuple[int, Future[Any]] | None = None
        # Its own group: the thread that writes talks to the other ranks while the loop does so too.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        every = self._settings.every_steps
        self._run = replace(self._run, train_seconds=self._run.train_seconds + report.seconds)
        if self._writing is not None and self._writing[1].done():
            self.wait()
        last = report.step == report.num_steps or loop.stopped_because is not None
        if every and (report.step % every == 0 or (last and report.step > every)):
            self._save(loop)

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
        """At the end of the run, failed ones included: nothing half written stays."""
        if self._writing is not None:
            self._writing[1].exception()
            self._writing = None
        if self._ranks.is_main:
            self._directory.discard_staging()

    def _save(self, loop: TrainingLoop) -> None:
        self.wait()
        step = loop.step
        hooks = {name: hook.state_dict() for name, hook in self._stateful.items()}
        saved = replace(self._run, step=step, num_ranks=self._ranks.size, hooks=hooks)
        staging = self._directory.staging(step)
        with writing(self._directory.at(step), self._kept()):
            if self._ranks.is_main:
                self._directory.stage(step)
                write_durably(staging / STATE_FILE, saved.to_json())
            self._ranks.barrier()
            future = async_save(
                gather(loop, self._ranks.rank) | _tensors(loop, self._stateful),
                storage_writer=FileSystemWriter(staging, single_file_per_rank=True, sync_files=True),
                process_group=self._group,
                no_dist=self._ranks.size == 1,
            )
        self._writing = (step, cast("Future[Any]", future))
        if not self._settings.asynchronous:
            self.wait()

    def _kept(self) -> str:
        latest = self._directory.latest()
        return f"the last good checkpoint is {latest}" if latest else "no checkpoint had been written before"


def restore(checkpoint: Path, loop: TrainingLoop, stateful: Mapping[str, Stateful], ranks: Ranks) -> SavedRun:
    """Puts weights, optimizer, position and random numbers back to where `checkpoint` was written.

    With as many ranks as wrote it every random number that follows is the one that would have followed; with others
    each rank goes on with numbers of its own, which matters to dropout alone. Raises ResumeRefused.
    """
    saved = SavedRun.read(checkpoint)
    state = gather(loop, ranks.rank) | _tensors(loop, stateful)
    if saved.num_ranks != ranks.size:
        del state[f"random-{ranks.rank}"]
    load(state, checkpoint_id=checkpoint, no_dist=ranks.size == 1)
    put_back(loop, state, ranks.rank)
    loop.step = saved.step
    for name, hook in stateful.items():
        hook.load_state_dict(saved.hooks[name])
    return saved


def _tensors(loop: TrainingLoop, stateful: Mapping[str, Stateful]) -> dict[str, Any]:
    return {name: tensors for name, hook in stateful.items() if (tensors := hook.tensors(loop))}
