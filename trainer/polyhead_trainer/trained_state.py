"""Copies of a run's trained weights in host memory, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead_trainer.methods import Tuned


def copy_state(tuned: Tuned, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The trained weights, on the CPU; in the tensors of `into` where an earlier copy is not needed any more."""
    state = tuned.trained_state()
    if into is None:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
    for name, tensor in state.items():
        into[name].copy_(tensor)
    return into


@torch.no_grad()
def restore_state(tuned: Tuned, state: dict[str, Tensor]) -> None:
    trained = tuned.trained_state()
    assert trained.keys() == state.keys()
    for name, tensor in trained.items():
        tensor.copy_(state[name])
