"""The head, and transformers' own classifier tree around a backbone that is already loaded, in int8 for instance."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from polyhead_core.backbone import Backbone
from polyhead_core.errors import BackboneError
from polyhead_trainer.tokens import padding_id


class ScoreHead(nn.Linear):
    """score(x) = W h, h = x after the added fully connected layers, each h <- gelu(D h + b).

    Without added layers it is the very linear layer of transformers' classifiers: a subclass, so that its weight is
    named `score.weight` either way and peft takes it for a linear layer. W starts at zero (all labels equally likely),
    D at kaiming's uniform. Computes in float32, whatever the backbone does.
    """

    def __init__(self, in_features: int, num_labels: int, hidden: Sequence[int] = ()) -> None:
        super().__init__(hidden[-1] if hidden else in_features, num_labels, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        widths = [in_features, *hidden]
        self.dense = nn.ModuleList(
            nn.Linear(width, following, dtype=torch.float32) for width, following in pairwise(widths)
        )

    @property
    def hidden(self) -> list[int]:
        """Widths of the added layers."""
        return [layer.out_features for layer in self.dense]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features of the first layer] -> [..., labels]."""
        h = x.to(self.weight.dtype)
        for layer in self.dense:
            h = F.gelu(layer(h))
        return super().forward(h)


@contextmanager
def without_scores(head: nn.Module) -> Iterator[None]:
    """Inside, all labels are equally likely, as before the head has learned anything."""
    hook = head.register_forward_hook(lambda module, inputs, scores: torch.zeros_like(scores))
    try:
        yield
    finally:
        hook.remove()


def classifier(backbone: Backbone, labels: Sequence[str], *, hidden: Sequence[int] = (), seed: int) -> PreTrainedModel:
    """A frozen AutoModelForSequenceClassification that shares the backbone's layers, with a fresh head, `score`.

    The head reads the last token that is not padding. Raises BackboneError.
    """
    config = copy.deepcopy(backbone.model.config)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.pad_token_id = padding_id(backbone.tokenizer)
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, TypeError) as error:
        raise BackboneError(f"transformers has no classifier for {backbone.architecture}: {error}") from error
    prefix = model.base_model_prefix
    if prefix != backbone.model.base_model_prefix or not isinstance(getattr(model, "score", None), nn.Linear):
        raise BackboneError(f"{type(model).__name__} is no decoder with a linear layer `score`")
    width = model.score.in_features
    setattr(model, prefix, getattr(backbone.model, prefix))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.score = ScoreHead(width, len(labels), hidden).to(backbone.device)
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model
