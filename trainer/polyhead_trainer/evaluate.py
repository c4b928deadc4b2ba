"""What a model knows, measured the same way before and after training: loss, answers, choices, general text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from polyhead_core.errors import ConfigError
from polyhead_trainer import scores
from polyhead_trainer.batching import Batch, collate
from polyhead_trainer.config import EvaluateSection
from polyhead_trainer.data import EncodedExample, load_examples
from polyhead_trainer.errors import DataError
from polyhead_trainer.objectives.chunked_loss import over_label_logits
from polyhead_trainer.objectives.label_logits import first_label_rows

WINDOW_TOKENS = 512
"""General text is read in windows of this many tokens, each without what came before it."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    held_out_loss: float
    """Mean over the held-out label tokens (classification: texts; preferences: pairs) of the loss, in nats."""
    exact_match: float | None = None
    """Share of the generated answers that equal the reference."""
    chrf: float | None = None
    """chrF2 of the generated answers, 0 to 100."""
    rouge_1: float | None = None
    """ROUGE-1 of the generated answers, 0 to 100; `rouge_2` and `rouge_l` likewise."""
    rouge_2: float | None = None
    rouge_l: float | None = None
    choice_accuracy: float | None = None
    """Share of the held-out examples whose right choice is the most likely one."""
    earlier_loss: float | None = None
    """Of evaluate.earlier: mean over its label tokens, in nats."""
    general_perplexity: float | None = None
    """Perplexity of the general text."""
    accuracy: float | None = None
    """Classification: share of the held-out texts that get their label."""
    macro_f1: float | None = None
    """Classification: mean of the labels' F1 scores."""
    preference_accuracy: float | None = None
    """Preferences: share of the held-out pairs whose chosen completion gained more on the backbone than the rejected
    one; ties count half, so the backbone is at 0.5."""
    reward_margin: float | None = None
    """Preferences: mean over the pairs of what the chosen completion gained more, times beta."""
    chosen_likelier: float | None = None
    """Preferences: share of the held-out pairs whose chosen completion is the likelier of the two."""
    answers: list[str]
    """To the first held-out examples."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The held-out examples and settings of one run, prepared once for several models."""

    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    held_out: list[EncodedExample]
    answered: list[EncodedExample]
    choice_ids: list[int]
    """First token of each possible completion; empty: not a classification."""
    general_ids: list[int]
    max_new_tokens: int
    batch_size: int
    """Most examples in one forward pass."""
    earlier: list[EncodedExample] = field(default_factory=list)
    """Held-out examples of tasks that were learned before."""
    logit_chunk: int = 0
    """Most logits held at once, as training.logit_chunk; 0: all."""

    @torch.no_grad()  # not inference_mode: what FSDP gathers in it could not be trained with afterwards
    def measure(self, model: torch.nn.Module) -> Measures:
        model.eval()
        loss, accuracy = self._held_out(model)
        answers = self.generate(model, self.answered)
        references = [item.example.reference for item in self.answered]
        return Measures(
            held_out_loss=loss,
            **answer_scores(answers, references),
            choice_accuracy=accuracy,
            earlier_loss=self.earlier_loss(model),
            general_perplexity=self._general_perplexity(model) if self.general_ids else None,
            answers=answers,
        )

    @torch.no_grad()
    def held_out_loss(self, model: torch.nn.Module) -> float:
        """As `measure` gives it; `model` must be in evaluation mode."""
        return self._held_out(model)[0]

    @torch.no_grad()
    def earlier_loss(self, model: torch.nn.Module) -> float | None:
        """On the data of tasks that were learned before; None: none are named."""
        return self._loss(model, self.earlier)[0] if self.earlier else None

    def _held_out(self, model: torch.nn.Module) -> tuple[float, float | None]:
        """(loss, choice accuracy)"""
        loss, num_right = self._loss(model, self.held_out)
        return loss, num_right / len(self.held_out) if self.choice_ids else None

    def _loss(self, model: torch.nn.Module, examples: Sequence[EncodedExample]) -> tuple[float, int]:
        """(mean over the label tokens, in nats; examples whose right choice is the likeliest)"""
        total, num_labels, num_right = 0.0, 0, 0
        for chunk in by_length(examples, self.batch_size):
            batch = collate(chunk, self.pad_id).to(compute_device(model))
            loss, right = self._of_batch(model, batch)
            total, num_right = total + loss, num_right + right
            num_labels += batch.num_labels
        return total / num_labels, num_right

    def _of_batch(self, model: torch.nn.Module, batch: Batch) -> tuple[float, int]:
        """(loss summed over the label tokens, in nats; examples whose right choice is the likeliest)"""
        is_first_N = torch.zeros_like(batch.targets_N, dtype=torch.bool)
        is_first_N[first_label_rows(batch)] = True

        def of_rows(logits_CV: Tensor, rows: slice) -> tuple[float, int]:
            targets_C, is_first_C = batch.targets_N[rows], is_first_N[rows]
            loss = F.cross_entropy(logits_CV, targets_C, reduction="sum").item()
            return loss, self._num_right(logits_CV[is_first_C], targets_C[is_first_C])

        losses, rights = zip(*over_label_logits(model, batch, self.logit_chunk, of_rows), strict=True)
        return sum(losses), sum(rights)

    def _num_right(self, logits_FV: Tensor, targets_F: Tensor) -> int:
        """At the first label tokens of F examples."""
        if not self.choice_ids:
            return 0
        choices = torch.tensor(self.choice_ids, device=logits_FV.device)
        return int((choices[logits_FV[:, choices].argmax(dim=1)] == targets_F).sum())

    def generate(self, model: torch.nn.Module, examples: Sequence[EncodedExample]) -> list[str]:
        """Greedy answers, in the order of `examples`."""
        texts: dict[int, str] = {}
        for chunk in self._prompt_batches(model, examples):
            width = max(item.prompt_length for item in chunk)
            prompts = [item.token_ids[: item.prompt_length] for item in chunk]
            ids_BT = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in prompts])
            mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
            generated_BT = cast(Any, model).generate(
                input_ids=ids_BT.to(compute_device(model)),
                attention_mask=mask_BT.to(compute_device(model)),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.pad_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            for item, row in zip(chunk, generated_BT.tolist(), strict=True):
                texts[id(item)] = cast(str, self.tokenizer.decode(row[width:], skip_special_tokens=True))
        return [texts[id(item)] for item in examples]

    def _prompt_batches(self, model: torch.nn.Module, examples: Sequence[EncodedExample]) -> list[list[EncodedExample]]:
        """Padding belongs to the left of a prompt; what peft puts in front of prompts comes before the padding, so
        there only prompts of one length share a batch."""
        if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
            return by_length(examples, self.batch_size)
        ordered = sorted(examples, key=lambda item: item.prompt_length)
        groups = [list(group) for _, group in groupby(ordered, key=lambda item: item.prompt_length)]
        return [part for group in groups for part in by_length(group, self.batch_size)]

    def _general_perplexity(self, model: torch.nn.Module) -> float:
        total, num_predicted = 0.0, 0
        for start in range(0, len(self.general_ids), WINDOW_TOKENS):
            ids_1T = torch.tensor([self.general_ids[start : start + WINDOW_TOKENS]], device=compute_device(model))
            if ids_1T.shape[1] < 2:
                continue
            everywhere = torch.ones_like(ids_1T)
            window = Batch(
                token_ids_BT=ids_1T,
                attention_mask_BT=everywhere,
                # The last token predicts nothing that is there.
                predicts_BT=F.pad(everywhere[:, 1:].bool(), (0, 1)),
                targets_N=ids_1T[0, 1:],
            )
            total += self._of_batch(model, window)[0]
            num_predicted += window.num_labels
        return math.exp(total / num_predicted)


def prepare(
    settings: EvaluateSection,
    held_out: Sequence[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int,
    max_length: int = 512,
    logit_chunk: int = 0,
) -> Evaluator:
    """`max_length`: of the examples of earlier tasks, as data.max_length; `logit_chunk`: as training.logit_chunk.

    Raises ConfigError, DataError.
    """
    return Evaluator(
        tokenizer=tokenizer,
        pad_id=pad_id,
        held_out=list(held_out[: settings.max_examples or None]),
        answered=list(held_out[: settings.generate_examples]),
        choice_ids=_choice_ids(settings.choices, held_out, tokenizer),
        general_ids=_general_ids(settings.general_text, settings.general_tokens, tokenizer),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        earlier=_earlier_examples(settings, tokenizer, max_length),
        logit_chunk=logit_chunk,
    )


def _earlier_examples(
    settings: EvaluateSection, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedExample]:
    if not settings.earlier:
        return []
    columns, most = settings.earlier_columns, settings.max_examples or None
    each = [load_examples([entry], tokenizer, max_length, columns=columns).examples for entry in settings.earlier]
    return [example for examples in each for example in examples[:most]]


def _choice_ids(
    choices: Sequence[str], held_out: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if "" in choices:
        raise ConfigError(f"evaluate.choices = {list(choices)}: an empty text is no completion")
    first = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
    if len(set(first)) < len(first):
        raise ConfigError(f"evaluate.choices = {list(choices)}: two of them start with the same token")
    for item in held_out if choices else ():
        if item.example.reference not in choices:
            answer = item.example.reference
            raise DataError(f"{item.example.origin}: completion {answer!r} is not in evaluate.choices {list(choices)}")
    return first


def _general_ids(file: Path | None, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read evaluate.general_text {file}: {error}") from error
    # Ten characters a token is more than any text needs: a large file is not tokenised in full.
    ids = tokenizer(text[: num_tokens * 10], verbose=False)["input_ids"][:num_tokens]
    if len(ids) < 2:
        raise DataError(f"evaluate.general_text {file}: too short to measure")
    return cast(list[int], ids)


def answer_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The fields of Measures about generated answers; none where nothing was answered."""
    if not answers:
        return {}
    rouge_1, rouge_2, rouge_l = scores.rouge(answers, references)
    return {
        "exact_match": scores.exact_match(answers, references),
        "chrf": scores.chrf(answers, references),
        "rouge_1": rouge_1,
        "rouge_2": rouge_2,
        "rouge_l": rouge_l,
    }


def by_length(examples: Sequence[EncodedExample], batch_size: int) -> list[list[EncodedExample]]:
    """Batches of neighbours in length."""
    ordered = sorted(examples, key=len)
    return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]


def compute_device(model: torch.nn.Module) -> torch.device:
    """Where the model computes and wants its inputs: shards that rest in host memory are gathered elsewhere."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor):
        # Without a number: each process has made its own GPU the current one.
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device
