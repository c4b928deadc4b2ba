"""Logits at the label positions alone, never for the whole batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from polyhead_trainer.batching import Batch


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, vocabulary] in float32 at the N positions that predict a label.

    transformers gathers these positions before the LM head when `logits_to_keep` is a boolean mask: with short answers
    to long prompts most of the head's work and memory is saved, and the model's own forward stays in charge.

    A packed row is for models that `packing.prepare_packing` has made ready.
    """
    return cast(Tensor, model(**model_inputs(batch)).logits).float()


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a causal language model is called with for the logits at the label positions."""
    places = _packed_places(batch) if batch.example_lengths else {"attention_mask": batch.attention_mask_BT}
    return {"input_ids": batch.token_ids_BT, "use_cache": False, "logits_to_keep": batch.predicts_BT, **places}


def _packed_places(batch: Batch) -> dict[str, Any]:
    device = batch.token_ids_BT.device
    positions = [torch.arange(length, device=device) for length in batch.example_lengths]
    return {
        # From 0 at every example: what rotary and learned positions go by.
        "position_ids": torch.cat(positions).unsqueeze(0),
        # Four dimensions say that the mask is made already; packed attention needs none.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "example_lengths": batch.example_lengths,
    }


def first_label_rows(batch: Batch) -> Tensor:
    """Row numbers [B] in the label logits of each example's first label."""
    counts_B = batch.predicts_BT.sum(dim=1)
    return torch.cumsum(counts_B, dim=0) - counts_B
