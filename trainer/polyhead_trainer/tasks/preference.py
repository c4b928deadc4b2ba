"""Preferences between two completions of a prompt, learned by an adapter with DPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_trainer import data, evaluate
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.data.encode import expect_form
from polyhead_trainer.evaluate import Measures, by_length, compute_device
from polyhead_trainer.methods import Tuned, reload_adapter
from polyhead_trainer.objectives.preference import (
    EncodedPair,
    PreferenceObjective,
    pair_log_probs,
    preference_losses,
    reward_margins,
)
from polyhead_trainer.tokens import padding_id


@dataclass(frozen=True, kw_only=True)
class PreferenceEvaluator:
    """Implements Evaluator. Answers, choices and general text are measured as for completions, the chosen ones."""

    completions: evaluate.Evaluator
    held_out: list[EncodedExample]
    reference_P2: Tensor
    """The untouched backbone's log-probabilities of the held-out pairs."""
    beta: float
    logit_chunk: int
    """Most logits held at once, as training.logit_chunk; 0: all."""

    @property
    def answered(self) -> list[EncodedExample]:
        return self.completions.answered

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measures:
        model.eval()
        policy_P2 = self._log_probs(model)
        margins_P = reward_margins(policy_P2, self.reference_P2, self.beta)
        return dataclasses.replace(
            self.completions.measure(model),
            held_out_loss=preference_losses(margins_P).mean().item(),
            preference_accuracy=won_share(margins_P),
            reward_margin=margins_P.mean().item(),
            chosen_likelier=won_share(policy_P2[:, 0] - policy_P2[:, 1]),
        )

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        margins_P = reward_margins(self._log_probs(model), self.reference_P2, self.beta)
        return preference_losses(margins_P).mean().item()

    def earlier_loss(self, model: nn.Module) -> float | None:
        return self.completions.earlier_loss(model)

    def _log_probs(self, model: nn.Module) -> Tensor:
        given = self.completions
        return all_log_probs(model, self.held_out, given.pad_id, given.batch_size, self.logit_chunk)


def won_share(margins_P: Tensor) -> float:
    """Share of the margins above 0, a tie as half: the backbone against itself is at one half."""
    return ((margins_P > 0).float() + 0.5 * (margins_P == 0).float()).mean().item()


@torch.no_grad()
def all_log_probs(
    model: nn.Module, pairs: Sequence[EncodedExample], pad_id: int, batch_size: int, logit_chunk: int
) -> Tensor:
    """As pair_log_probs, in the order of `pairs`, on the CPU. [P, 2]"""
    place = {id(pair): index for index, pair in enumerate(pairs)}
    found_P2 = torch.zeros(len(pairs), 2)
    for chunk in by_length(pairs, batch_size):
        log_probs_B2 = pair_log_probs(model, chunk, pad_id, compute_device(model), logit_chunk)
        found_P2[[place[id(pair)] for pair in chunk]] = log_probs_B2.cpu()
    return found_P2


@dataclass(frozen=True, kw_only=True)
class PreferenceTask:
    """Implements Task."""

    backbone: Backbone
    config: RunConfig

    @property
    def labels(self) -> list[str]:
        return []

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        expect_form(example, "preference")
        chosen, rejected = (
            data.encode(Example(origin=example.origin, prompt=example.prompt, completion=completion), tokenizer)
            for completion in (example.completion, example.rejected)
        )
        return EncodedPair(
            example=example,
            token_ids=chosen.token_ids,
            is_label=chosen.is_label,
            prompt_length=chosen.prompt_length,
            rejected=rejected,
        )

    def objective(self, tuned: Tuned) -> PreferenceObjective:
        return PreferenceObjective(
            pad_id=padding_id(self.backbone.tokenizer),
            beta=self.config.preference.beta,
            reference=tuned.baseline,
            logit_chunk=self.config.training.logit_chunk,
        )

    def evaluator(self, held_out: Sequence[EncodedExample]) -> PreferenceEvaluator:
        settings, tokenizer = self.config.evaluate, self.backbone.tokenizer
        pairs = [cast(EncodedPair, pair) for pair in held_out]
        measured: list[EncodedExample] = [*pairs[: settings.max_examples or None]]
        chosen = [pair.chosen for pair in pairs]
        length = self.config.data.max_length
        logit_chunk = self.config.training.logit_chunk
        completions = evaluate.prepare(settings, chosen, tokenizer, padding_id(tokenizer), length, logit_chunk)
        self.backbone.model.eval()
        return PreferenceEvaluator(
            completions=completions,
            held_out=measured,
            reference_P2=all_log_probs(
                self.backbone.model, measured, completions.pad_id, completions.batch_size, logit_chunk
            ),
            beta=self.config.preference.beta,
            logit_chunk=logit_chunk,
        )

    def reload(self, directory: Path) -> nn.Module:
        return reload_adapter(self.backbone, directory)


def preference(config: RunConfig, backbone: Backbone) -> PreferenceTask:
    return PreferenceTask(backbone=backbone, config=config)
