"""The tensors of a checkpoint: trained parameters, optimizer states, random number generators."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from polyhead_trainer.loop import TrainingLoop


def gather(loop: TrainingLoop, rank: int) -> dict[str, Any]:
    """Views of what this rank holds of them (DTensors where they are sharded); loading into it changes the run.

    The optimizer's groups are left out: learning rates and the like follow from the settings and the step.
    """
    states = get_optimizer_state_dict(loop.tuned.model, loop.optimizer)["state"]
    return {"trained": loop.tuned.trained_state(), "optimizer": states, f"random-{rank}": random_state()}


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
