"""Causal language modelling on completions: the loss of the label tokens, given everything before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead_trainer.batching import collate, pack
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.objectives.chunked_loss import chunk_rows, chunked_loss_sum
from polyhead_trainer.objectives.label_logits import label_logits


@dataclass(frozen=True)
class CompletionObjective:
    """Implements Objective."""

    pad_id: int
    logit_chunk: int = 0
    """Most logits held at once, as training.logit_chunk; 0: all."""
    packing: bool = False
    """Lay the examples of a micro-batch end to end instead of padding them; the loss is the same."""

    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        return sum(example.num_labels for example in examples)

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        batch = (pack(examples) if self.packing else collate(examples, self.pad_id)).to(device)
        vocabulary: int = cast(Any, model).config.vocab_size
        rows = chunk_rows(self.logit_chunk, batch.num_labels, vocabulary)
        if rows is not None:
            return chunked_loss_sum(model, batch, rows)
        return F.cross_entropy(label_logits(model, batch), batch.targets_N, reduction="sum")
