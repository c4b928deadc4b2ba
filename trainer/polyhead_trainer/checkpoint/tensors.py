"""The tensors of a checkpoint: trained parameters, optimizer states, random number generators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from polyhead_trainer.errors import ResumeRefused
from polyhead_trainer.loop import TrainingLoop

METADATA_FILE = ".metadata"
"""Of torch.distributed.checkpoint: which tensor is in which file."""


def gather(loop: TrainingLoop, rank: int) -> dict[str, Any]:
    """Views of what this rank holds of them (DTensors where they are sharded); loading into it changes the run.

    The optimizer's groups are left out: learning rates and the like follow from the settings and the step.
    """
    states = get_optimizer_state_dict(loop.tuned.model, loop.optimizer)["state"]
    return {"trained": loop.tuned.trained_state(), "optimizer": states, f"random-{rank}": random_state()}


def load_into(state: dict[str, Any], checkpoint: Path, *, alone: bool = True) -> None:
    """Fills the tensors of `state` with what `checkpoint` holds; `alone`: in one process. Raises ResumeRefused."""
    if not (checkpoint / METADATA_FILE).is_file():
        raise _damaged(checkpoint, f"{METADATA_FILE} is missing")
    try:
        load(state, checkpoint_id=checkpoint, no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise _damaged(checkpoint, str(cause).partition("\n")[0] or type(cause).__name__) from error


def _damaged(checkpoint: Path, reason: str) -> ResumeRefused:
    return ResumeRefused(
        f"{checkpoint} cannot be read: {reason}; it is damaged, or was changed by something else: delete it, and the "
        "one before it, where there is one, is taken"
    )


def put_back(loop: TrainingLoop, loaded: dict[str, Any], rank: int) -> None:
    """After torch.distributed.checkpoint has loaded into what `gather` returned."""
    current: dict[str, Any] = dict(get_optimizer_state_dict(loop.tuned.model, loop.optimizer))
    set_optimizer_state_dict(loop.tuned.model, loop.optimizer, {**current, "state": loaded["optimizer"]})
    if f"random-{rank}" in loaded:
        set_random_state(loaded[f"random-{rank}"])


def random_state() -> dict[str, Tensor]:
    """Of Python, torch and this process's GPU, as tensors: no pickles."""
    _, numbers, _ = random.getstate()
    found = {"python": torch.tensor(numbers, dtype=torch.int64), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: dict[str, Tensor]) -> None:
    version, _, spare = random.getstate()
    random.setstate((version, tuple(state["python"].tolist()), spare))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
