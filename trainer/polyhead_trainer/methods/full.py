"""Full fine-tuning: every weight of a float backbone is trained, and the output is a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_core.backbone.checkpoint import compute_fingerprint
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import FullSettings, TrainingSection
from polyhead_trainer.methods.tuned import trained_parameters


@dataclass
class FullTuned:
    """Implements Tuned. Its baseline is the model itself, and holds before the first step alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_adapter: bool = False

    @contextmanager
    def baseline(self) -> Iterator[None]:
        yield

    def parameter_groups(self, settings: TrainingSection) -> list[dict[str, Any]]:
        return [{"params": list(trained_parameters(self.model).values()), "lr": settings.learning_rate}]

    def trained_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        return compute_fingerprint(directory)


def full(backbone: Backbone, settings: FullSettings) -> FullTuned:
    if backbone.quantization != "none" or backbone.dtype != torch.float32:
        raise ConfigError(
            f"adapter.method = full trains the backbone's own weights, and these are {backbone.quantization} in "
            f"{backbone.dtype_name}: set backbone.quantization = none and backbone.dtype = float32"
        )
    backbone.model.requires_grad_(True)
    return FullTuned(backbone.model, backbone.tokenizer)
