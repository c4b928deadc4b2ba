"""Completions and answers of a conversation: causal language modelling, as the server generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone
from polyhead_trainer import data, evaluate
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.methods import Tuned, reload_adapter
from polyhead_trainer.methods.full import is_whole_model, load_whole_model
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.tokens import padding_id


@dataclass(frozen=True, kw_only=True)
class CompletionTask:
    """Implements Task."""

    backbone: Backbone
    config: RunConfig

    @property
    def labels(self) -> list[str]:
        return []

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        return data.encode(example, tokenizer)

    def objective(self, tuned: Tuned) -> CompletionObjective:
        settings = self.config.training
        return CompletionObjective(padding_id(self.backbone.tokenizer), settings.logit_chunk, settings.packing)

    def evaluator(self, held_out: Sequence[EncodedExample]) -> evaluate.Evaluator:
        tokenizer, config = self.backbone.tokenizer, self.config
        return evaluate.prepare(
            config.evaluate,
            held_out,
            tokenizer,
            padding_id(tokenizer),
            config.data.max_length,
            config.training.logit_chunk,
        )

    def reload(self, directory: Path) -> nn.Module:
        if is_whole_model(directory):
            return load_whole_model(AutoModelForCausalLM, self.backbone, directory)
        return reload_adapter(self.backbone, directory)


def completion(config: RunConfig, backbone: Backbone) -> CompletionTask:
    return CompletionTask(backbone=backbone, config=config)
