"""A run's examples as its settings want them: training examples held in memory or streamed, held-out ones held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyhead_trainer.config import DataSection
from polyhead_trainer.data import EncodedData, EncodedExample, ExampleStream, check_disjoint, load_examples
from polyhead_trainer.data.load import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RunData:
    train: EncodedData | ExampleStream
    held_out: EncodedData

    @property
    def examples(self) -> list[EncodedExample] | ExampleStream:
        """To learn from."""
        return self.train if isinstance(self.train, ExampleStream) else self.train.examples

    def sample(self) -> Iterable[EncodedExample]:
        """All training examples, or of a stream the first ones."""
        return self.train.sample() if isinstance(self.train, ExampleStream) else self.train.examples

    @property
    def stream(self) -> ExampleStream | None:
        return self.train if isinstance(self.train, ExampleStream) else None


def open_data(settings: DataSection, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> RunData:
    """`encoding`: the task's. Raises DataError, also where a held-out example is learned too."""
    held_out = load_examples(settings.held_out, tokenizer, settings.max_length, encoding, settings.columns)
    if settings.streaming:
        stream = ExampleStream(
            settings.train,
            lambda example: encoding(example, tokenizer),
            max_length=settings.max_length,
            buffer_size=settings.shuffle_buffer,
            columns=settings.columns,
        )
        stream.check(held_out.examples)
        return RunData(train=stream, held_out=held_out)
    train = load_examples(settings.train, tokenizer, settings.max_length, encoding, settings.columns)
    check_disjoint(train.examples, held_out.examples)
    return RunData(train=train, held_out=held_out)
