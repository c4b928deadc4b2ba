"""Lets FSDP2 of torch 2.11 shard integers, as torch 2.12 and later do by themselves."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion


@contextmanager
def integers_shardable() -> Iterator[None]:
    """Around `fully_shard`: torch 2.11 makes every shard a parameter that wants a gradient, which no integer may, and
    takes that back for frozen ones in its next line."""
    if torch.__version__ >= TorchVersion("2.12"):
        yield
        return
    # A private module, which no later torch is asked for.
    module: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    module.nn = SimpleNamespace(Module=nn.Module, Parameter=_parameter)
    try:
        yield
    finally:
        module.nn = nn


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(data, requires_grad and data.is_floating_point())
