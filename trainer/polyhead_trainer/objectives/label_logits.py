"""Logits at the label positions alone, never for the whole batch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from polyhead_trainer.batching import Batch


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, vocabulary] in float32 at the N positions that predict a label.

    transformers gathers these positions before the LM head when `logits_to_keep` is a boolean mask: with short answers
    to long prompts most of the head's work and memory is saved, and the model's own forward stays in charge.
    """
    output = model(
        input_ids=batch.token_ids_BT,
        attention_mask=batch.attention_mask_BT,
        use_cache=False,
        logits_to_keep=batch.predicts_BT,
    )
    return cast(Tensor, output.logits).float()


def first_label_rows(batch: Batch) -> Tensor:
    """Row numbers [B] in the label logits of each example's first label."""
    counts_B = batch.predicts_BT.sum(dim=1)
    return torch.cumsum(counts_B, dim=0) - counts_B
