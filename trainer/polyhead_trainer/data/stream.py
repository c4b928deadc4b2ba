"""Training examples that are read, shuffled and encoded on the way, where memory could not hold them all.

Memory holds one buffer of rows and one window of encoded examples. The order is a function of (seed, epoch) and the
buffer's size. `datasets.IterableDataset` can shuffle and resume too, but starts with an empty buffer then, and the
order is another: here a continued run reads its epoch's rows again from the start, without parsing them, until the
buffer is what it was.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyhead_trainer.data.examples import EncodedExample, Example
from polyhead_trainer.data.load import check_not_learned
from polyhead_trainer.data.read import parse_row, read_examples
from polyhead_trainer.data.rows import Row, Source
from polyhead_trainer.data.sources import open_sources
from polyhead_trainer.errors import DataError

SAMPLE = 1000
"""Examples that stand for all where something is tried on examples before the first step."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the data the next step begins."""

    step: int = 0
    """Steps given so far."""
    epoch: int = 0
    row: int = 0
    """Of the epoch's order: where the window begins."""
    batch: int = 0
    """Batches of that window given so far."""
    num_too_long: int = 0
    """Examples left out in the first epoch, before the window."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    examples: list[EncodedExample]
    num_rows: int
    """Read for it, those that were too long included."""


class ExampleStream:
    """Gives the examples of one step after another; owns the position. Implements Stateful."""

    def __init__(
        self,
        entries: Sequence[str | Path],
        encoding: Callable[[Example], EncodedExample],
        *,
        max_length: int,
        buffer_size: int,
        columns: Mapping[str, str] = {},
    ) -> None:
        """`entries` and `columns` as in the settings; `buffer_size`: rows that are drawn from."""
        self.position = Position()
        self._entries = entries
        self._columns = columns
        self._encoding = encoding
        self._max_length = max_length
        self._buffer_size = buffer_size
        self._num_records = 0

    def __len__(self) -> int:
        """Records in one pass, those that are too long included; 0 before `check`."""
        return self._num_records

    def check(self, held_out: Iterable[EncodedExample]) -> None:
        """Reads all records once. Raises DataError for the first bad one, and where a held-out example is learned too.

        What only encoding can find (a label that is not known, a form for another task) is found on the way.
        """
        check_not_learned(self._counted(), [item.example for item in held_out])

    def sample(self) -> Iterator[EncodedExample]:
        """The first ones of the data that fit. Raises DataError."""
        fitting = map(self._encoded, read_examples(self._entries, self._columns))
        return itertools.islice((example for example in fitting if example is not None), SAMPLE)

    def steps(
        self, *, batch_size: int, window_batches: int, seed: int, num_steps: int
    ) -> Iterator[list[EncodedExample]]:
        """The examples of each step from `position` on up to `num_steps`, over as many epochs as that takes.

        Batches are cut from windows of `window_batches`, sorted by length. Raises DataError.
        """
        while self.position.step < num_steps:
            epoch = self.position.epoch
            order = shuffled_rows(open_sources(self._entries), random.Random(f"{seed}/{epoch}"), self._buffer_size)
            rows = itertools.islice(order, self.position.row, None)
            while (window := self._window(rows, batch_size * window_batches)).num_rows:
                start = self.position
                end = replace(start, row=start.row + window.num_rows, batch=0)
                if epoch == 0:
                    end = replace(end, num_too_long=end.num_too_long + window.num_rows - len(window.examples))
                batches = _batches(window.examples, batch_size, random.Random(f"{seed}/{epoch}/{start.row}"))
                for number, batch in enumerate(batches[start.batch :], start=start.batch + 1):
                    if self.position.step == num_steps:
                        return
                    # Before the step is taken: a checkpoint written after it must begin with the next one.
                    place = end if number == len(batches) else replace(start, batch=number)
                    self.position = replace(place, step=self.position.step + 1)
                    yield batch
                self.position = replace(end, step=self.position.step)
            if self.position.row == self.position.num_too_long and epoch == 0:
                raise self._nothing_fits()
            self.position = replace(self.position, epoch=epoch + 1, row=0, batch=0)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = Position(**state)

    def tensors(self, loop: object) -> dict[str, Any]:
        return {}

    def _counted(self) -> Iterator[Example]:
        self._num_records = 0
        for example in read_examples(self._entries, self._columns):
            self._num_records += 1
            yield example

    def _window(self, rows: Iterator[Row], size: int) -> _Window:
        examples: list[EncodedExample] = []
        num_rows = 0
        while len(examples) < size and (row := next(rows, None)) is not None:
            num_rows += 1
            example = self._encoded(parse_row(row, self._columns))
            if example is not None:
                examples.append(example)
        return _Window(examples=examples, num_rows=num_rows)

    def _encoded(self, example: Example) -> EncodedExample | None:
        """None where it is too long."""
        encoded = self._encoding(example)
        return encoded if encoded.width <= self._max_length else None

    def _nothing_fits(self) -> DataError:
        names = ", ".join(map(str, self._entries))
        return DataError(f"{names}: every example is longer than max_length = {self._max_length} tokens")


def shuffled_rows(sources: Sequence[Source], draw: random.Random, buffer_size: int) -> Iterator[Row]:
    """All rows once: the sources in random order, and each row at random out of the next `buffer_size`."""
    held: list[Row] = []
    for source in draw.sample(sources, len(sources)):
        for row in source.rows():
            if len(held) < buffer_size:
                held.append(row)
                continue
            place = draw.randrange(buffer_size)
            given, held[place] = held[place], row
            yield given
    draw.shuffle(held)
    yield from held


def _batches(examples: Sequence[EncodedExample], batch_size: int, draw: random.Random) -> list[list[EncodedExample]]:
    nearby = sorted(examples, key=len)
    batches = [nearby[at : at + batch_size] for at in range(0, len(nearby), batch_size)]
    draw.shuffle(batches)
    return batches
