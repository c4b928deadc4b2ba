"""Completions by an encoder-decoder (T5, mT5, mt0): the encoder reads the prompt, the decoder writes the completion.

B examples, S tokens of the longest prompt, T of the longest completion, N label tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import data, scores
from polyhead_trainer.config import EvaluateSection, RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.evaluate import Measures, by_length
from polyhead_trainer.methods import Tuned, reload_adapter
from polyhead_trainer.methods.full import is_whole_model, load_whole_model
from polyhead_trainer.tokens import padding_id

IGNORED = -100
"""What transformers takes for no label."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBatch:
    prompt_ids_BS: Tensor
    prompt_mask_BS: Tensor
    labels_BT: Tensor
    """IGNORED where a completion is over."""


def collate_pairs(examples: Sequence[EncodedExample], pad_id: int, device: torch.device | str) -> Seq2SeqBatch:
    prompts = [torch.tensor(item.token_ids[: item.prompt_length]) for item in examples]
    completions = [torch.tensor(item.token_ids[item.prompt_length :]) for item in examples]
    pad = nn.utils.rnn.pad_sequence
    return Seq2SeqBatch(
        prompt_ids_BS=pad(prompts, batch_first=True, padding_value=pad_id).to(device),
        prompt_mask_BS=pad([torch.ones_like(ids) for ids in prompts], batch_first=True).to(device),
        labels_BT=pad(completions, batch_first=True, padding_value=IGNORED).to(device),
    )


@dataclass(frozen=True, kw_only=True)
class Seq2SeqObjective:
    """Cross-entropy of the completion's tokens, its end token included. Implements Objective."""

    pad_id: int

    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        return sum(example.num_labels for example in examples)

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        batch = collate_pairs(examples, self.pad_id, device)
        # The model shifts the labels to the right by itself to make the decoder's input.
        output = model(input_ids=batch.prompt_ids_BS, attention_mask=batch.prompt_mask_BS, labels=batch.labels_BT)
        logits_BTV = cast(Tensor, output.logits).float()
        return F.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )


@dataclass(frozen=True, kw_only=True)
class Seq2SeqEvaluator:
    """Implements Evaluator."""

    tokenizer: PreTrainedTokenizerBase
    objective: Seq2SeqObjective
    held_out: list[EncodedExample]
    answered: list[EncodedExample]
    max_new_tokens: int

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measures:
        model.eval()
        answers = self._generate(model)
        references = [item.example.reference for item in self.answered]
        return Measures(
            held_out_loss=self.held_out_loss(model),
            exact_match=scores.exact_match(answers, references) if answers else None,
            chrf=scores.chrf(answers, references) if answers else None,
            answers=answers,
        )

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        chunks = by_length(self.held_out)
        total = sum(self.objective.loss_sum(model, chunk, device).item() for chunk in chunks)
        return total / self.objective.num_units(self.held_out)

    def _generate(self, model: nn.Module) -> list[str]:
        texts: dict[int, str] = {}
        for chunk in by_length(self.answered):
            batch = collate_pairs(chunk, self.objective.pad_id, next(model.parameters()).device)
            generated_BT = cast(Any, model).generate(
                input_ids=batch.prompt_ids_BS,
                attention_mask=batch.prompt_mask_BS,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
            for item, row in zip(chunk, generated_BT, strict=True):
                texts[id(item)] = cast(str, self.tokenizer.decode(row, skip_special_tokens=True))
        return [texts[id(item)] for item in self.answered]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqTask:
    """Implements Task."""

    backbone: Backbone
    settings: EvaluateSection

    @property
    def labels(self) -> list[str]:
        return []

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        data.expect_form(example, "completion")
        return data.encode(example, tokenizer)

    def objective(self, tuned: Tuned) -> Seq2SeqObjective:
        return Seq2SeqObjective(pad_id=padding_id(self.backbone.tokenizer))

    def evaluator(self, held_out: Sequence[EncodedExample]) -> Seq2SeqEvaluator:
        return Seq2SeqEvaluator(
            tokenizer=self.backbone.tokenizer,
            objective=Seq2SeqObjective(pad_id=padding_id(self.backbone.tokenizer)),
            held_out=list(held_out[: self.settings.max_examples or None]),
            answered=list(held_out[: self.settings.generate_examples]),
            max_new_tokens=self.settings.max_new_tokens,
        )

    def reload(self, directory: Path) -> nn.Module:
        if is_whole_model(directory):
            return load_whole_model(AutoModelForSeq2SeqLM, self.backbone, directory)
        return reload_adapter(self.backbone, directory)


def seq2seq(config: RunConfig, backbone: Backbone) -> Seq2SeqTask:
    """Raises ConfigError."""
    if not backbone.model.config.is_encoder_decoder:
        raise ConfigError(
            f"task = seq2seq needs an encoder-decoder, and {backbone.source!r} is {backbone.architecture}: set "
            "task = completion"
        )
    return Seq2SeqTask(backbone=backbone, settings=config.evaluate)
