"""A run's examples: read, encoded, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead_trainer.data.encode import encode
from polyhead_trainer.data.examples import EncodedData, EncodedExample, Example
from polyhead_trainer.data.read import read_examples
from polyhead_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Encoding = Callable[[Example, "PreTrainedTokenizerBase"], EncodedExample]


def load_examples(
    entries: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    encoding: Encoding = encode,
    columns: Mapping[str, str] = {},
) -> EncodedData:
    """`entries` and `columns` as in the settings; `encoding`: the task's; unset: completions. Raises DataError."""
    examples = [encoding(example, tokenizer) for example in read_examples(entries, columns)]
    fitting = [example for example in examples if example.width <= max_length]
    if not fitting:
        raise DataError(
            f"{', '.join(map(str, entries))}: every example is longer than max_length = {max_length} tokens"
        )
    return EncodedData(examples=fitting, num_too_long=len(examples) - len(fitting))


def check_disjoint(train: Iterable[EncodedExample], held_out: Iterable[EncodedExample]) -> None:
    """Raises DataError where a held-out example is learned as well: what is measured on it would be worth nothing."""
    check_not_learned((item.example for item in train), (item.example for item in held_out))


def check_not_learned(learned: Iterable[Example], held_out: Iterable[Example]) -> None:
    """As check_disjoint. Goes through all of `learned` once and holds none of them."""
    origins = {example.identity: example.origin for example in held_out}
    for example in learned:
        if example.identity in origins:
            raise DataError(f"{origins[example.identity]}: this held-out example is learned too: {example.origin}")
