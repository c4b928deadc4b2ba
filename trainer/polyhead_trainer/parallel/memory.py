"""What a rank holds, measured while it holds all of it, beside what it would hold as one of DDP's replicas."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyhead_trainer.parallel.apply import local

if TYPE_CHECKING:
    from polyhead_trainer.loop import StepReport, TrainingLoop


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank's tensors."""

    parameters: int
    """Frozen ones included."""
    buffers: int
    gradients: int
    optimizer: int


class RankMemoryMeter:
    """Measures during the first step that this process makes; as a hook of the loop it then stands aside."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.held: RankMemory | None = None
        self.replica: RankMemory | None = None
        """What DDP would hold."""

        def after_optimizer_step(*_: Any) -> None:
            self.held, self.replica = measure(model, optimizer)

        self._registration = optimizer.register_step_post_hook(after_optimizer_step)

    def as_dict(self) -> dict[str, dict[str, int]] | None:
        """None where no step was made."""
        if self.held is None or self.replica is None:
            return None
        return {"held": asdict(self.held), "replica": asdict(self.replica)}

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self._registration.remove()


def measure(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[RankMemory, RankMemory]:
    """Of this rank, and of a rank that holds all of it. Between the optimizer's step and the end of the gradients."""
    return _held(model, optimizer, lambda tensor: local(tensor).nbytes), _held(model, optimizer, _whole)


def _whole(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, size: Callable[[Tensor], int]) -> RankMemory:
    parameters = list(model.parameters())
    states: Iterable[Any] = (value for state in optimizer.state.values() for value in state.values())
    return RankMemory(
        parameters=sum(size(parameter) for parameter in parameters),
        buffers=sum(size(buffer) for buffer in model.buffers()),
        gradients=sum(size(parameter.grad) for parameter in parameters if parameter.grad is not None),
        optimizer=sum(size(value) for value in states if isinstance(value, Tensor)),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far (with a GPU: of its memory)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
