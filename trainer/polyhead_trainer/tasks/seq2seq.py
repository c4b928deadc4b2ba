"""Completions by an encoder-decoder (T5, mT5, mt0): the encoder reads the prompt, the decoder writes the completion.

B examples, S tokens of the longest prompt, T of the longest completion, N label tokens, C of them in a chunk, H hidden
size, V vocabulary.
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
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import data
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.evaluate import Measures, answer_scores, by_length, compute_device
from polyhead_trainer.methods import Tuned, reload_adapter
from polyhead_trainer.methods.full import is_whole_model, load_whole_model
from polyhead_trainer.objectives.chunked_loss import chunk_rows, forward_replaced, in_chunks
from polyhead_trainer.objectives.label_logits import whole_model
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
    logit_chunk: int = 0
    """Most logits held at once, as training.logit_chunk; 0: all."""

    def num_units(self, examples: Sequence[EncodedExample]) -> int:
        return sum(example.num_labels for example in examples)

    def loss_sum(self, model: nn.Module, examples: Sequence[EncodedExample], device: torch.device) -> Tensor:
        batch = collate_pairs(examples, self.pad_id, device)
        # Padded positions have logits too, unless they are computed in chunks.
        rows = chunk_rows(self.logit_chunk, batch.labels_BT.numel(), cast(Any, model).config.vocab_size)
        if rows is not None:
            return chunked_seq2seq_loss_sum(model, batch, rows)
        # The model shifts the labels to the right by itself to make the decoder's input.
        output = model(
            input_ids=batch.prompt_ids_BS,
            attention_mask=batch.prompt_mask_BS,
            labels=batch.labels_BT,
            use_cache=False,
        )
        logits_BTV = cast(Tensor, output.logits).float()
        return F.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )


def chunked_seq2seq_loss_sum(model: nn.Module, batch: Seq2SeqBatch, chunk_rows: int) -> Tensor:
    """As objectives.chunked_loss: the model's own forward computes both halves, [C, vocabulary] logits at a time."""
    whole = whole_model(model)
    head, decoder = whole.get_output_embeddings(), whole.get_decoder()
    is_label_BT = batch.labels_BT != IGNORED
    hidden_NH = _decoded(model, whole, batch)[is_label_BT]
    nothing_read = BaseModelOutput(last_hidden_state=hidden_NH.detach()[None, :1])

    def loss_of(hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        decoded = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_CH.unsqueeze(0))
        with forward_replaced(decoder, lambda *_, **__: decoded):
            output = whole.forward(
                encoder_outputs=nothing_read, decoder_input_ids=batch.prompt_ids_BS[:1, :1], use_cache=False
            )
        return F.cross_entropy(output.logits[0].float(), targets_C, reduction="sum")

    return in_chunks(loss_of, hidden_NH, batch.labels_BT[is_label_BT], chunk_rows, head)


def _decoded(model: nn.Module, whole: Any, batch: Seq2SeqBatch) -> Tensor:
    """What the decoder returns, [B, T, H], without any logits."""
    taken: list[Tensor] = []
    handles = [
        whole.get_decoder().register_forward_hook(lambda _, __, output: taken.append(output[0])),
        # FSDP gathers for backward when a gradient reaches what the model returned. The encoder's states among that are
        # reached too late, in the middle of the pass: out of step with a rank whose logits are not in chunks.
        model.register_forward_hook(lambda _, __, output: output.logits, prepend=True),
    ]
    try:
        with forward_replaced(whole.get_output_embeddings(), lambda hidden, *_, **__: hidden[..., :1]):
            model(
                input_ids=batch.prompt_ids_BS,
                attention_mask=batch.prompt_mask_BS,
                decoder_input_ids=whole.prepare_decoder_input_ids_from_labels(labels=batch.labels_BT),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    (hidden_BTH,) = taken
    return hidden_BTH


@dataclass(frozen=True, kw_only=True)
class Seq2SeqEvaluator:
    """Implements Evaluator."""

    tokenizer: PreTrainedTokenizerBase
    objective: Seq2SeqObjective
    held_out: list[EncodedExample]
    answered: list[EncodedExample]
    max_new_tokens: int
    batch_size: int

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measures:
        model.eval()
        answers = self._generate(model)
        references = [item.example.reference for item in self.answered]
        return Measures(
            held_out_loss=self.held_out_loss(model),
            **answer_scores(answers, references),
            answers=answers,
        )

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        device = compute_device(model)
        chunks = by_length(self.held_out, self.batch_size)
        total = sum(self.objective.loss_sum(model, chunk, device).item() for chunk in chunks)
        return total / self.objective.num_units(self.held_out)

    def earlier_loss(self, model: nn.Module) -> None:
        """Its configuration names no earlier tasks."""

    def _generate(self, model: nn.Module) -> list[str]:
        texts: dict[int, str] = {}
        for chunk in by_length(self.answered, self.batch_size):
            batch = collate_pairs(chunk, self.objective.pad_id, compute_device(model))
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
    config: RunConfig

    @property
    def labels(self) -> list[str]:
        return []

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        data.expect_form(example, "completion")
        return data.encode(example, tokenizer)

    def objective(self, tuned: Tuned) -> Seq2SeqObjective:
        return self._objective()

    def _objective(self) -> Seq2SeqObjective:
        return Seq2SeqObjective(
            pad_id=padding_id(self.backbone.tokenizer), logit_chunk=self.config.training.logit_chunk
        )

    def evaluator(self, held_out: Sequence[EncodedExample]) -> Seq2SeqEvaluator:
        settings = self.config.evaluate
        return Seq2SeqEvaluator(
            tokenizer=self.backbone.tokenizer,
            objective=self._objective(),
            held_out=list(held_out[: settings.max_examples or None]),
            answered=list(held_out[: settings.generate_examples]),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
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
    return Seq2SeqTask(backbone=backbone, config=config)
