"""Direct preference optimisation (Rafailov et al. 2023): the better of two completions is to gain on the worse one.

loss = -log sigmoid(beta * ((log p(c) - log r(c)) - (log p(w) - log r(w)))), c the chosen completion, w the rejected
one, p the model, r the reference: the same model without its adapter. log p(y) is the sum over y's tokens, end token
included. beta times such a difference is the completion's implicit reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead_trainer.batching import Batch, collate
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.objectives.chunked_loss import chunk_rows, chunked_loss_sums
from polyhead_trainer.objectives.label_logits import label_logits


@dataclass(frozen=True, kw_only=True)
class EncodedPair(EncodedExample):
    """The chosen completion after its prompt, with the rejected one beside it."""

    rejected: EncodedExample

    @property
    def num_labels(self) -> int:
        return sum(self.is_label) + self.rejected.num_labels

    @property
    def width(self) -> int:
        return max(len(self.token_ids), len(self.rejected))

    @property
    def chosen(self) -> EncodedExample:
        return EncodedExample(
            example=self.example,
            token_ids=self.token_ids,
            is_label=self.is_label,
            prompt_length=self.prompt_length,
        )

    def __len__(self) -> int:
        return len(self.token_ids) + len(self.rejected)


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """Implements Objective; its unit is the pair."""

    pad_id: int
    beta: float
    reference: Callable[[], AbstractContextManager[None]]
    """Inside, the model is the reference: a method's `baseline`."""
    logit_chunk: int = 0
    """Most logits held at once, as training.logit_chunk; 0: all."""

    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        return len(examples)

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        reference_B2 = self._reference(model, examples, device)
        policy_B2 = pair_log_probs(model, examples, self.pad_id, device, self.logit_chunk)
        return preference_losses(reward_margins(policy_B2, reference_B2, self.beta)).sum()

    @torch.no_grad()
    def _reference(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        was_training = model.training
        # A backbone's own dropout would make another reference of every step.
        model.eval()
        try:
            with self.reference():
                return pair_log_probs(model, examples, self.pad_id, device, self.logit_chunk)
        finally:
            model.train(was_training)


def reward_margins(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Implicit reward of the chosen completion less that of the rejected one, [B]."""
    rewards_B2 = beta * (policy_B2 - reference_B2)
    return rewards_B2[:, 0] - rewards_B2[:, 1]


def preference_losses(margins_B: Tensor) -> Tensor:
    return -F.logsigmoid(margins_B)


def pair_log_probs(
    model: nn.Module,
    pairs: Sequence[EncodedExample],
    pad_id: int,
    device: torch.device | str,
    logit_chunk: int = 0,
) -> Tensor:
    """log p(completion | prompt) of (chosen, rejected), [B, 2] in float32, in one forward pass over 2 B rows."""
    both = [cast(EncodedPair, pair) for pair in pairs]
    batch = collate([*(pair.chosen for pair in both), *(pair.rejected for pair in both)], pad_id).to(device)
    rows = chunk_rows(logit_chunk, batch.num_labels, cast(Any, model).config.vocab_size)
    sums_R = _log_probs(model, batch) if rows is None else _chunked_log_probs(model, batch, rows)
    return sums_R.view(2, -1).T


def _log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Of each of R rows, summed over its label tokens. [R]"""
    log_probs_N = -F.cross_entropy(label_logits(model, batch), batch.targets_N, reduction="none")
    rows_N = batch.predicts_BT.nonzero()[:, 0]
    return torch.zeros(len(batch.token_ids_BT), device=log_probs_N.device).index_add(0, rows_N, log_probs_N)


def _chunked_log_probs(model: nn.Module, batch: Batch, rows: int) -> Tensor:
    sizes_R: list[int] = batch.predicts_BT.sum(dim=1).tolist()
    return -torch.stack(chunked_loss_sums(model, batch, rows, sizes_R))
