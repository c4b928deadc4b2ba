"""Logits at the label positions alone, never for the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from polyhead_trainer.batching import Batch


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, vocabulary] in float32 at the N positions that predict a label.

    With short answers to long prompts most of the LM head's work and memory is saved, and the model's own forward stays
    in charge. A packed row is for models that `packing.prepare_packing` has made ready.
    """
    return cast(Tensor, run_to_labels(model, batch).logits).float()


def run_to_labels(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for the batch when its LM head is given the N label positions alone, [N, hidden size].

    They are chosen here: of the releases of transformers that this runs on, the older ones know no mask for it.
    """
    places = _packed_places(batch) if batch.example_lengths else {"attention_mask": batch.attention_mask_BT}
    with _chosen_before_head(whole_model(model).get_output_embeddings(), batch.predicts_BT):
        return model(input_ids=batch.token_ids_BT, use_cache=False, **places)


def whole_model(model: nn.Module) -> Any:
    """transformers' own model, which peft's may stand around."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _chosen_before_head(head: nn.Module, chosen_BT: Tensor) -> Iterator[None]:
    def choose(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        (hidden,) = args
        # Virtual tokens that an adapter puts in front of the batch's own predict no label.
        return hidden[nn.functional.pad(chosen_BT, (hidden.shape[1] - chosen_BT.shape[1], 0))]

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


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
