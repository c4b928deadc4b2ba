"""`training.compile`: torch.compile on the forward of each transformer layer, while a training runs.

By layer and not the whole model ("regional"): all layers of a kind share one compilation, and what surrounds them
(embedding, loss at the label tokens, checkpointing, FSDP's hooks) stays as it is. Shapes are dynamic, as batches are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.cpp_extension import get_cxx_compiler

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import TrainingSection
from polyhead_trainer.decoder_layers import require_transformer_layers, wrapped_forwards


@contextmanager
def compiled_layers(model: nn.Module, settings: TrainingSection) -> Iterator[None]:
    """Compiles the layers of `model` inside the block, at their first use. Raises ConfigError."""
    if not settings.compile:
        yield
        return
    layers = require_transformer_layers(model, "training.compile")
    device = next(model.parameters()).device
    if device.type == "cpu" and shutil.which(get_cxx_compiler()) is None:
        raise ConfigError(
            f"training.compile needs a C++ compiler on the CPU, and {get_cxx_compiler()} was not found: install one, "
            "or leave training.compile out"
        )
    with wrapped_forwards(layers, lambda _, forward: torch.compile(forward, dynamic=True)):
        yield
