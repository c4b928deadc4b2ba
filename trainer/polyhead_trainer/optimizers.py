"""The optimizers by name, and the bytes of state that each keeps. Every parameter group keeps its own peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import TrainingSection

Groups = list[dict[str, Any]]
FLOAT32_BYTES = 4
MIN_8BIT_ELEMENTS = 4096
"""bitsandbytes keeps the states of smaller parameters in float32."""
BLOCK_8BIT = 256
"""Elements of a state that share one float32 scale (Dettmers et al. 2022)."""
MAP_8BIT_BYTES = 2 * 256 * FLOAT32_BYTES
"""The two code books, of signed and unsigned values, which all parameters share."""


def make_optimizer(groups: Groups, settings: TrainingSection) -> Optimizer:
    """`groups`: as Tuned.parameter_groups gives them. Raises ConfigError for one that the device cannot do."""
    optimizer = _MAKERS[settings.optimizer](groups, settings)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def state_bytes(name: str, parameters: Sequence[nn.Parameter], settings: TrainingSection) -> int:
    """What the optimizer holds beside `parameters` after its first step; step counters apart."""
    return _STATE_BYTES[name](parameters, settings)


def _adamw(groups: Groups, settings: TrainingSection) -> Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)


def _adamw_8bit(groups: Groups, settings: TrainingSection) -> Optimizer:
    from bitsandbytes import optim

    optimizer: Optimizer = cast(Any, optim).AdamW8bit(groups, betas=settings.betas, weight_decay=settings.weight_decay)
    return optimizer


def _paged_adamw_8bit(groups: Groups, settings: TrainingSection) -> Optimizer:
    from bitsandbytes import optim

    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if devices - {"cuda", "meta"}:
        raise ConfigError(
            f"training.optimizer = paged-adamw-8bit moves states between a GPU and host memory, and the parameters are "
            f"on {', '.join(sorted(devices))}, where it would not page: use adamw-8bit, the same without pages"
        )
    make = cast(Any, optim).PagedAdamW8bit
    optimizer: Optimizer = make(groups, betas=settings.betas, weight_decay=settings.weight_decay)
    return optimizer


def _sgd(groups: Groups, settings: TrainingSection) -> Optimizer:
    return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)


def _adafactor(groups: Groups, settings: TrainingSection) -> Optimizer:
    return torch.optim.Adafactor(groups, weight_decay=settings.weight_decay)


_MAKERS: dict[str, Callable[[Groups, TrainingSection], Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _adamw_8bit,
    "paged-adamw-8bit": _paged_adamw_8bit,
    "sgd": _sgd,
    "adafactor": _adafactor,
}


def _adamw_bytes(parameters: Sequence[nn.Parameter], _: TrainingSection) -> int:
    return sum(2 * parameter.numel() * FLOAT32_BYTES for parameter in parameters)


def _adamw_8bit_bytes(parameters: Sequence[nn.Parameter], settings: TrainingSection) -> int:
    large = [parameter.numel() for parameter in parameters if parameter.numel() >= MIN_8BIT_ELEMENTS]
    small = [parameter for parameter in parameters if parameter.numel() < MIN_8BIT_ELEMENTS]
    blocks = sum(math.ceil(elements / BLOCK_8BIT) for elements in large)
    quantised = 2 * sum(large) + 2 * blocks * FLOAT32_BYTES + (MAP_8BIT_BYTES if large else 0)
    return quantised + _adamw_bytes(small, settings)


def _sgd_bytes(parameters: Sequence[nn.Parameter], settings: TrainingSection) -> int:
    return sum(parameter.numel() * FLOAT32_BYTES for parameter in parameters) if settings.momentum else 0


def _adafactor_bytes(parameters: Sequence[nn.Parameter], _: TrainingSection) -> int:
    """One row and one column of second moments for a matrix (Shazeer and Stern 2018), all of them for a vector."""
    elements = 0
    for parameter in parameters:
        if parameter.dim() < 2:
            elements += parameter.numel()
        else:
            elements += parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
    return elements * FLOAT32_BYTES


_STATE_BYTES: dict[str, Callable[[Sequence[nn.Parameter], TrainingSection], int]] = {
    "adamw": _adamw_bytes,
    "adamw-8bit": _adamw_8bit_bytes,
    "paged-adamw-8bit": _adamw_8bit_bytes,
    "sgd": _sgd_bytes,
    "adafactor": _adafactor_bytes,
}
