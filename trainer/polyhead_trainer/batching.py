"""Which examples form a step, and their padded tensors. The order is a function of (seed, epoch) alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyhead_trainer.data import EncodedExample, ExampleStream

WINDOW_BATCHES = 8
"""Batches are cut from windows of this many, sorted by length: little padding, and still another mix in every epoch."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B examples padded on the right to T tokens, or packed: one row (B = 1) of all of them, one after another."""

    token_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 at tokens, 0 at padding."""
    predicts_BT: Tensor
    """True where the next token is learned."""
    targets_N: Tensor
    """Those next tokens, row by row."""
    example_lengths: tuple[int, ...] = ()
    """Tokens of each example in a packed row; empty: not packed."""

    @property
    def num_labels(self) -> int:
        return len(self.targets_N)

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device | str) -> Batch:
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All examples once, as batches of neighbours in length in random order. Only one batch may be smaller."""
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    window = batch_size * WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        nearby = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [nearby[at : at + batch_size] for at in range(0, len(nearby), batch_size)]
    draw.shuffle(batches)
    return batches


def steps(
    examples: Sequence[EncodedExample] | ExampleStream, *, batch_size: int, seed: int, num_steps: int, done: int = 0
) -> Iterator[list[EncodedExample]]:
    """The examples of each of `num_steps` optimizer steps without the first `done`, over as many epochs as that takes.

    A stream goes on where it stands, which must be after `done` steps.
    """
    if isinstance(examples, ExampleStream):
        assert examples.position.step == done, "a stream's position is restored with the rest of a run"
        return examples.steps(batch_size=batch_size, window_batches=WINDOW_BATCHES, seed=seed, num_steps=num_steps)
    return itertools.islice(_epochs(examples, batch_size, seed), done, num_steps)


def _epochs(examples: Sequence[EncodedExample], batch_size: int, seed: int) -> Iterator[list[EncodedExample]]:
    lengths = [len(example) for example in examples]
    for epoch in itertools.count():
        for batch in epoch_order(lengths, batch_size, seed, epoch):
            yield [examples[index] for index in batch]


def collate(examples: Sequence[EncodedExample], pad_id: int) -> Batch:
    """One example a row."""
    return _fill([[example] for example in examples], pad_id)


def pack(examples: Sequence[EncodedExample]) -> Batch:
    """All in one row, without padding. The model must know how to keep them apart: see `packing`."""
    return replace(_fill([examples], pad_id=0), example_lengths=tuple(map(len, examples)))


def _fill(rows: Sequence[Sequence[EncodedExample]], pad_id: int) -> Batch:
    width = max(sum(map(len, row)) for row in rows)
    token_ids_BT = torch.full((len(rows), width), pad_id)
    attention_mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
    predicts_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    targets: list[int] = []
    for row, shared in enumerate(rows):
        start = 0
        for example in shared:
            end = start + len(example)
            token_ids = torch.as_tensor(example.token_ids)
            is_label = torch.as_tensor(example.is_label, dtype=torch.bool)
            token_ids_BT[row, start:end] = token_ids
            attention_mask_BT[row, start:end] = 1
            # The logits at position t predict token t + 1; nothing predicts an example's first token, and what comes
            # before it in a packed row least of all.
            predicts_BT[row, start : end - 1] = is_label[1:]
            targets += token_ids[1:][is_label[1:]].tolist()
            start = end
    return Batch(
        token_ids_BT=token_ids_BT,
        attention_mask_BT=attention_mask_BT,
        predicts_BT=predicts_BT,
        targets_N=torch.tensor(targets),
    )
