"""A classification head alone on a frozen backbone, with added fully connected layers where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from polyhead_core.adapter_directory import stamp_backbone
from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.backbones import HUB_NAMES
from polyhead_trainer.config import HeadSettings
from polyhead_trainer.heads import ScoreHead, save_head, without_scores
from polyhead_trainer.methods.tuned import TrainedAtOneRate


@dataclass
class HeadTuned(TrainedAtOneRate):
    """Implements Tuned. Its baseline knows nothing: all labels are equally likely."""

    model: PreTrainedModel
    head: ScoreHead
    base_model: str
    is_adapter: bool = True

    @contextmanager
    def baseline(self) -> Iterator[None]:
        with without_scores(self.head):
            yield

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        labels: Any = self.model.config.id2label
        save_head(self.head, [labels[index] for index in range(len(labels))], self.base_model, directory)
        return stamp_backbone(directory, fingerprint=fingerprint, quantization=quantization)


def head(backbone: Backbone, settings: HeadSettings) -> HeadTuned:
    score = getattr(backbone.model, "score", None)
    if not isinstance(score, ScoreHead):
        raise ConfigError("adapter.method = head trains a classifier: set task = classification")
    score.requires_grad_(True)
    base_model = HUB_NAMES.get(backbone.source, backbone.source)
    return HeadTuned(model=backbone.model, head=score, base_model=base_model)
