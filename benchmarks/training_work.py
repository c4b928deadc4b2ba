"""What the systems of `training.py` have to do: which model, which examples, in which batches."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_backbone import SHAPES, as_backbone, random_backbone, random_model, word_tokenizer
from training_files import demo_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyhead_core.backbone import Backbone, load_backbone, resolve_source
from polyhead_core.backbone.load import DTYPES
from polyhead_core.paths import default_cache_dir
from polyhead_trainer.batching import steps
from polyhead_trainer.data import EncodedExample, Example, load_examples
from polyhead_trainer.tokens import padding_id

HELD_OUT = 100


@dataclass(frozen=True, kw_only=True)
class Work:
    directory: Path
    """Of the backbone, as transformers reads it."""
    tokenizer: Any
    pad_id: int
    examples: list[EncodedExample]
    """All of them are learned once."""
    batch_size: int
    seed: int
    device: str
    shape: str = ""
    """Of a model with random weights (random_backbone.SHAPES) in place of the directory's; empty: the directory's."""

    def model(self, dtype: str) -> Any:
        """In floating point, on the device."""
        if self.shape:
            return random_model(self.shape, torch.device(self.device), DTYPES[dtype], self.seed)
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=DTYPES[dtype]).to(self.device)

    def backbone(self, quantization: str, dtype: str) -> Backbone:
        """`dtype` auto: the backbone's own choice."""
        if not self.shape:
            return load_backbone(str(self.directory), quantization=quantization, dtype=dtype, device=self.device)
        if quantization == "none":
            return as_backbone(self.model(dtype), self.shape, "none")
        own = torch.float32 if self.device == "cpu" else torch.bfloat16
        return random_backbone(self.shape, torch.device(self.device), own, self.seed)

    @property
    def num_steps(self) -> int:
        return len(self.examples) // self.batch_size

    @property
    def batches(self) -> list[list[EncodedExample]]:
        """One a step, neighbours in length: Polyhead's own loop makes them, and all but TRL's packing learn them in
        this order."""
        return list(steps(self.examples, batch_size=self.batch_size, seed=self.seed, num_steps=self.num_steps))


def demo_work(options: argparse.Namespace) -> tuple[Work, list[EncodedExample]]:
    """The recipes' tweets, and those held out."""
    directory = resolve_source(options.backbone, default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = demo_data()
    train = load_examples([data / "tweet_sentiment" / "train.jsonl"], tokenizer, 512).examples
    held_out = load_examples([data / "tweet_sentiment" / "held_out.jsonl"], tokenizer, 512).examples[:HELD_OUT]
    work = Work(
        directory=directory,
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        examples=random.Random(options.seed).sample(train, options.steps * options.batch_size),
        batch_size=options.batch_size,
        seed=options.seed,
        device=options.device,
    )
    return work, held_out


def random_work(options: argparse.Namespace) -> tuple[Work, list[EncodedExample]]:
    """Random tokens, the second half of each example learned; lengths are log-normal about 200."""
    vocab_size = SHAPES[options.shape].vocab_size
    rng = random.Random(options.seed)

    def example(number: int) -> EncodedExample:
        length = min(512, max(32, round(rng.lognormvariate(5.3, 0.5))))
        ids = [rng.randrange(2, vocab_size) for _ in range(length)]
        half = length // 2
        return EncodedExample(
            example=Example(origin=f"random {number}"),
            token_ids=ids,
            is_label=[at >= half for at in range(length)],
            prompt_length=half,
        )

    examples = [example(number) for number in range(options.steps * options.batch_size + options.batch_size)]
    tokenizer = word_tokenizer(vocab_size)
    work = Work(
        directory=Path(),
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_token_id,
        examples=examples[options.batch_size :],
        batch_size=options.batch_size,
        seed=options.seed,
        device=options.device,
        shape=options.shape,
    )
    return work, examples[: options.batch_size]
