"""Streamed examples: all of them once an epoch, in an order that a continued run goes on with, and few in memory."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from polyhead_core.errors import ConfigError
from polyhead_trainer.batching import WINDOW_BATCHES, steps
from polyhead_trainer.config import parse_config
from polyhead_trainer.data import EncodedExample, Example, ExampleStream, Row, load_examples, open_sources
from polyhead_trainer.data.encode import encode
from polyhead_trainer.data.stream import shuffled_rows
from polyhead_trainer.errors import DataError
from tiny import tokenizer

BATCH = 4
MAX_LENGTH = 60
Steps = list[list[str]]


def by_words(example: Example) -> EncodedExample:
    """Encoding in no time: order and memory are what is tested here."""
    ids = list(map(len, example.prompt.split(" ")))
    return EncodedExample(example=example, token_ids=ids, is_label=[True] * len(ids), prompt_length=0)


def write_sources(folder: Path, counts: tuple[int, ...] = (90, 37, 60)) -> list[Path]:
    """A file of each format; every 11th example is too long."""
    draw = random.Random(0)
    made = []
    for number, (count, suffix) in enumerate(zip(counts, ("jsonl", "csv", "parquet"), strict=True)):
        words = [draw.randint(1, MAX_LENGTH - 1) if place % 11 else MAX_LENGTH + 1 for place in range(count)]
        records = [{"prompt": f"{number}.{place}" + " a" * n, "completion": "c"} for place, n in enumerate(words)]
        made.append(folder / f"{number}.{suffix}")
        if suffix == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(records), made[-1])
        elif suffix == "csv":
            made[-1].write_text("prompt,completion\n" + "\n".join(f"{r['prompt']},{r['completion']}" for r in records))
        else:
            made[-1].write_text("\n".join(map(json.dumps, records)))
    return made


def stream(files: list[Path], buffer_size: int = 25) -> ExampleStream:
    return ExampleStream(files, by_words, max_length=MAX_LENGTH, buffer_size=buffer_size)


def take(one: ExampleStream, num_steps: int, seed: int = 3) -> Steps:
    """What the steps from where it stands up to `num_steps` learn."""
    given = steps(one, batch_size=BATCH, seed=seed, num_steps=num_steps, done=one.position.step)
    return [[item.example.prompt for item in batch] for batch in given]


def test_an_epoch_is_every_example_once(tmp_path: Path) -> None:
    files = write_sources(tmp_path)
    held = load_examples(files, tokenizer(), MAX_LENGTH, lambda example, _: by_words(example))
    fitting = sorted(item.example.prompt for item in held.examples)
    one = stream(files)
    # One batch of every epoch is smaller.
    per_epoch = -(-len(fitting) // BATCH)
    given = take(one, 3 * per_epoch)
    epochs = [given[at : at + per_epoch] for at in range(0, len(given), per_epoch)]
    flat = [[prompt for batch in epoch for prompt in batch] for epoch in epochs]
    assert [sorted(epoch) for epoch in flat] == [fitting] * 3
    assert len({tuple(epoch) for epoch in flat}) == 3
    assert one.position.num_too_long == held.num_too_long > 0
    assert take(stream(files), 3 * per_epoch) == given
    assert take(stream(files), 3 * per_epoch, seed=4) != given
    spread = sum(max(map(len, b)) - min(map(len, b)) for b in epochs[0]) / per_epoch
    assert spread < MAX_LENGTH / 2


def test_it_goes_on_from_every_step_as_if_never_stopped(tmp_path: Path) -> None:
    """Against the slow obvious way: the uninterrupted run."""
    files = write_sources(tmp_path)
    num_steps = 110  # more than two epochs
    whole = take(stream(files), num_steps)
    running = stream(files)
    given = steps(running, batch_size=BATCH, seed=3, num_steps=num_steps)
    for done in range(num_steps):
        continued = stream(files)
        continued.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert continued.position.step == done
        assert take(continued, min(done + 12, num_steps)) == whole[done : done + 12]
        next(given)
    assert running.position.step == num_steps
    assert take(running, num_steps) == []
    assert running.position.num_too_long == sum(-(-count // 11) for count in (90, 37, 60))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_buffer_draws_from_the_rows_that_come_next(tmp_path: Path, size: int) -> None:
    (file, *_) = write_sources(tmp_path)
    sources = open_sources([file])
    rows = [row.origin for row in sources[0].rows()]
    order = [row.origin for row in shuffled_rows(sources, random.Random(1), size)]
    assert sorted(order) == sorted(rows)
    assert (order == rows) == (size == 1)
    assert all(rows.index(origin) < given + size for given, origin in enumerate(order))


def test_few_examples_are_held(tmp_path: Path) -> None:
    files = write_sources(tmp_path, (4000, 0, 3000))
    files.pop(1)
    one = stream(files, buffer_size=50)
    one.check([])
    assert len(one) == 7000
    most = 0
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    try:
        for _ in islice(steps(one, batch_size=BATCH, seed=0, num_steps=1800), 0, None, 10):
            most = max(most, sum(type(item) in (Row, Example) for item in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert one.position.epoch == 1
    # The buffer, the window and the row that comes next; of Parquet one group of rows beside it is plain values.
    assert 50 < most <= 50 + BATCH * WINDOW_BATCHES + 2


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = []
    for num_records in (500, 4000):
        file = tmp_path / f"{num_records}.jsonl"
        with file.open("w") as out:
            for number in range(num_records):
                out.write(json.dumps({"prompt": f"{number}" + "x" * 2000, "completion": "c"}) + "\n")
        gc.collect()
        tracemalloc.start()
        one = stream([file], buffer_size=50)
        one.check([])
        for _ in steps(one, batch_size=BATCH, seed=0, num_steps=num_records // BATCH):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert file.stat().st_size > 8_000_000
    assert peaks[1] < 1.2 * peaks[0] < 2_000_000


def test_bad_records_and_learned_held_out_examples_are_found_before_the_first_step(tmp_path: Path) -> None:
    files = write_sources(tmp_path)
    held_out = [by_words(example) for example in (Example(origin="held:1", prompt="x", completion="c"),)]
    stream(files).check(held_out)
    with files[1].open("a") as file:
        file.write("\nx,c\n")
    with pytest.raises(DataError, match=r"held:1: this held-out example is learned too: .*1\.csv:39"):
        stream(files).check(held_out)
    with files[1].open("a") as file:
        file.write("x,\n")
    with pytest.raises(DataError, match=r"1\.csv:40: completion: must not be empty"):
        stream(files).check([])


def test_data_of_which_nothing_fits_end_the_run(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "a " * MAX_LENGTH, "completion": "c"}))
    with pytest.raises(DataError, match="every example is longer than max_length = 60 tokens"):
        take(stream([file]), 1)


def test_the_sample_is_of_examples_that_fit(tmp_path: Path) -> None:
    files = write_sources(tmp_path)
    found = list(stream(files).sample())
    assert len(found) == len(load_examples(files, tokenizer(), MAX_LENGTH, lambda one, _: by_words(one)).examples)
    assert max(map(len, found)) <= MAX_LENGTH


def test_a_streamed_run_needs_a_number_of_steps() -> None:
    values = {"output": "out", "data": {"train": ["a"], "held_out": ["b"], "streaming": True}}
    with pytest.raises(ConfigError, match=r"set training\.max_steps in place of training\.epochs"):
        parse_config({**values, "training": {"epochs": 1}}, "x")
    assert parse_config({**values, "training": {"max_steps": 1}}, "x").data.streaming


def test_the_real_encoding_is_the_same(tmp_path: Path) -> None:
    files, made = write_sources(tmp_path), tokenizer()
    held = load_examples(files, made, 200)
    by_origin = {item.example.origin: item for item in held.examples}
    one = ExampleStream(files, lambda example: encode(example, made), max_length=200, buffer_size=10)
    given = [item for batch in steps(one, batch_size=8, seed=0, num_steps=-(-len(by_origin) // 8)) for item in batch]
    assert {item.example.origin: item for item in given} == by_origin
