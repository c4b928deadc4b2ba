"""One label for a text: a score per label from the last token's hidden state, in place of the LM head."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_trainer import scores
from polyhead_trainer.batching import collate
from polyhead_trainer.config import EvaluateSection, RunConfig
from polyhead_trainer.data import EncodedExample, Example, read_examples
from polyhead_trainer.data.encode import expect_form
from polyhead_trainer.errors import DataError
from polyhead_trainer.evaluate import Measures, by_length, compute_device
from polyhead_trainer.heads import classifier, is_head_directory, load_head
from polyhead_trainer.methods import Tuned, reload_adapter
from polyhead_trainer.methods.full import is_whole_model, load_whole_model
from polyhead_trainer.tokens import padding_id


@dataclass(frozen=True, kw_only=True)
class LabelledText(EncodedExample):
    label_id: int

    @property
    def num_labels(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class ClassificationObjective:
    """Cross-entropy of the right label, averaged over texts. Implements Objective."""

    pad_id: int

    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        return len(examples)

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        logits_BL = label_scores(model, examples, self.pad_id, device)
        return F.cross_entropy(logits_BL, label_ids(examples).to(device), reduction="sum")


def label_scores(
    model: nn.Module, examples: Sequence[EncodedExample], pad_id: int, device: torch.device | str
) -> Tensor:
    """Logits [B, labels] in float32."""
    batch = collate(examples, pad_id).to(device)
    output = model(input_ids=batch.token_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    return cast(Tensor, output.logits).float()


def label_ids(examples: Sequence[EncodedExample]) -> Tensor:
    return torch.tensor([cast(LabelledText, example).label_id for example in examples])


@dataclass(frozen=True, kw_only=True)
class ClassificationEvaluator:
    """Implements Evaluator."""

    pad_id: int
    labels: list[str]
    held_out: list[EncodedExample]
    answered: list[EncodedExample]
    batch_size: int

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measures:
        model.eval()
        loss, found = self._classify(model, self.held_out)
        wanted = [item.example.reference for item in self.held_out]
        return Measures(
            held_out_loss=loss / len(wanted),
            accuracy=scores.exact_match(found, wanted),
            macro_f1=scores.macro_f1(found, wanted),
            answers=self._classify(model, self.answered)[1],
        )

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        return self._classify(model, self.held_out)[0] / len(self.held_out)

    def earlier_loss(self, model: nn.Module) -> None:
        """Its configuration names no earlier tasks."""

    def _classify(self, model: nn.Module, examples: Sequence[EncodedExample]) -> tuple[float, list[str]]:
        """(summed loss, the likeliest label of each of `examples`)."""
        total, found = 0.0, {}
        for chunk in by_length(examples, self.batch_size):
            logits_BL = label_scores(model, chunk, self.pad_id, compute_device(model))
            total += F.cross_entropy(logits_BL, label_ids(chunk).to(logits_BL.device), reduction="sum").item()
            for item, label in zip(chunk, logits_BL.argmax(dim=1).tolist(), strict=True):
                found[id(item)] = self.labels[label]
        return total, [found[id(item)] for item in examples]


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """Implements Task."""

    backbone: Backbone
    labels: list[str]
    settings: EvaluateSection

    @property
    def pad_id(self) -> int:
        return padding_id(self.backbone.tokenizer)

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        expect_form(example, "classification")
        if example.reference not in self.labels:
            raise DataError(f"{example.origin}: label {example.reference!r}: expected one of {', '.join(self.labels)}")
        # As data.encode does: the text of others is never read as control tokens.
        token_ids = tokenizer(example.prompt, split_special_tokens=True)["input_ids"]
        if not token_ids or token_ids[-1] == self.pad_id:
            raise DataError(f"{example.origin}: text: ends in the padding token, which would be taken for padding")
        return LabelledText(
            example=example,
            token_ids=token_ids,
            is_label=[False] * len(token_ids),
            prompt_length=len(token_ids),
            label_id=self.labels.index(example.reference),
        )

    def objective(self, tuned: Tuned) -> ClassificationObjective:
        return ClassificationObjective(pad_id=self.pad_id)

    def evaluator(self, held_out: Sequence[EncodedExample]) -> ClassificationEvaluator:
        return ClassificationEvaluator(
            pad_id=self.pad_id,
            labels=self.labels,
            held_out=list(held_out[: self.settings.max_examples or None]),
            answered=list(held_out[: self.settings.generate_examples]),
            batch_size=self.settings.batch_size,
        )

    def reload(self, directory: Path) -> nn.Module:
        if is_head_directory(directory):
            return load_head(self.backbone, directory)
        if is_whole_model(directory):
            return load_whole_model(AutoModelForSequenceClassification, self.backbone, directory)
        return reload_adapter(self.backbone, directory)


def classification(config: RunConfig, backbone: Backbone) -> ClassificationTask:
    """Raises BackboneError for an architecture without a classifier, DataError."""
    labels = config.data.labels or labels_of(config.data.train, config.data.columns)
    hidden = getattr(config.adapter, "hidden", [])
    model = classifier(backbone, labels, hidden=hidden, seed=config.training.seed)
    dressed = dataclasses.replace(backbone, model=model)
    return ClassificationTask(backbone=dressed, labels=labels, settings=config.evaluate)


def labels_of(entries: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The labels in the data, the most frequent first: a head of zeros, which names the first, is then as good as
    always naming the commonest. Raises DataError."""
    counts: Counter[str] = Counter()
    for example in read_examples(entries, columns):
        expect_form(example, "classification")
        counts[example.reference] += 1
    if len(counts) < 2:
        raise DataError(f"{', '.join(entries)}: {len(counts)} label: expected at least two")
    return sorted(counts, key=lambda label: (-counts[label], label))
