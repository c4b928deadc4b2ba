"""What a step is made of: chunks of prompts, shared prefixes, continuations, scores, and preemption."""

from __future__ import annotations

import pytest
from scheduler_bench import Bench

from polyhead_server.scheduler.sequence import Status


def test_prefill_in_chunks_beside_decodes() -> None:
    bench = Bench(tokens=8)
    bench.add("a", 3)
    bench.add("bb", 13)
    assert bench.step() == {"a": 3, "bb": 5}
    assert bench.step() == {"a": 1, "bb": 7}
    assert bench.step() == {"a": 1, "bb": 1}
    assert bench.step() == {"a": 1, "bb": 1}
    bench.run()
    assert bench.ended == ["a", "bb"]


def test_rows_are_limited_and_come_in_order_of_arrival() -> None:
    bench = Bench(rows=2)
    for name in ("a", "bb", "ccc"):
        bench.add(name, max_tokens=2)
    assert list(bench.step()) == ["a", "bb"]
    bench.step()
    assert bench.ended == ["a", "bb"]
    assert list(bench.step()) == ["ccc"]


def test_more_rows_than_tokens_leave_room_for_a_prefill() -> None:
    bench = Bench(rows=64, tokens=2)
    for i in range(5):
        bench.add("x" * (i + 1), 6)
    bench.run()
    assert len(bench.ended) == 5


def test_the_second_request_finds_the_first_ones_prefix() -> None:
    bench = Bench()
    prompt = list(range(10))
    (first,) = bench.add("a", prompt, max_tokens=1)
    bench.run()
    (second,) = bench.add("b", prompt, max_tokens=1)
    assert bench.step() == {"b": 2}
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)


def test_continuations_wait_for_the_first_ones_prompt() -> None:
    bench = Bench(tokens=8)
    sequences = bench.add("a", 18, n=3, max_tokens=3)
    assert bench.step() == {"a": 8}
    assert bench.step() == {"a": 8}
    assert bench.step() == {"a": 2}
    assert bench.step() == {"a": 1 + 2 + 2}
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 16, 16]
    assert len({sequence.block_ids[0] for sequence in sequences}) == 1
    bench.run()
    assert bench.ended == ["a"]


@pytest.mark.parametrize(("prompt", "prefix_caching"), [(3, True), (18, False)])
def test_continuations_run_at_once_where_nothing_can_be_shared(prompt: int, prefix_caching: bool) -> None:
    bench = Bench(prefix_caching=prefix_caching, tokens=128)
    bench.add("a", prompt, n=3)
    assert bench.step() == {"a": 3 * prompt}


def test_continuations_do_not_wait_for_a_sibling_that_ended() -> None:
    bench = Bench()
    bench.add("a", 18, n=3, max_tokens=1)
    bench.step()
    bench.run()
    assert bench.ended == ["a"]


def test_seeds() -> None:
    bench = Bench()
    assert [s.seed for s in bench.add("a", n=3, seed=2**64 - 2)] == [2**64 - 2, 2**64 - 1, 0]
    assert len({s.seed for s in bench.add("b", n=8)}) == 8


def test_scores_compute_every_token_and_end_after_the_prompt() -> None:
    bench = Bench(tokens=8)
    prompt = list(range(12))
    bench.add("a", prompt, max_tokens=1)
    bench.run()
    (sequence,) = bench.add("s", prompt, score=True)
    assert bench.step() == {"s": 8}
    step = bench.schedule()
    assert [(row.start, row.num_tokens, row.reaches_end, row.samples) for row in step.rows] == [(8, 4, True, False)]
    assert [row.sequence for row in bench.scheduler.advance(step)] == [sequence]
    assert bench.scheduler.finish(sequence)
    assert sequence.num_cached_tokens == 0


def test_preemption_takes_the_latest_and_keeps_its_output() -> None:
    bench = Bench(num_blocks=8, block_size=2, prefix_caching=False)
    (first,) = bench.add("a", [1, 2, 3, 4], max_tokens=12)
    (second,) = bench.add("b", [5, 6, 7], max_tokens=6)
    while not second.num_preemptions:
        bench.step()
    assert second.status is Status.WAITING
    assert second.block_ids == []
    assert second.output_token_ids
    assert first.num_preemptions == 0
    kept = list(second.token_ids)
    while second.status is Status.WAITING:
        bench.step()
    assert second.token_ids[: len(kept)] == kept
    bench.run()
    assert bench.ended == ["a", "b"]
    assert second.num_output_tokens == 6


def test_a_preempted_sequence_keeps_its_pin_and_goes_on_before_those_who_wait_for_it() -> None:
    bench = Bench("x", "y", num_blocks=8, block_size=2, rows=2, prefix_caching=False, wait_s=0.0)
    bench.add("a", [1, 2, 3, 4], adapter="x", max_tokens=12)
    (second,) = bench.add("b", [5, 6, 7], adapter="y", max_tokens=6)
    while not second.num_preemptions:
        bench.step()
    assert second.status is Status.WAITING
    bench.residency.resident.remove("y")  # replaced: whoever asks anew does not get this version
    bench.scheduler.check_integrity()
    assert sum(bench.scheduler.pins().values()) == 2
    for _ in range(50):
        bench.step()
    assert bench.ended == ["a", "b"]
    assert second.num_output_tokens == 6
    assert sum(bench.residency.pins.values()) == 0


def test_a_preempted_sequence_goes_on_though_an_earlier_one_waits_for_its_slot() -> None:
    bench = Bench("x", "y", num_blocks=8, block_size=2, prefix_caching=False, wait_s=0.0)
    bench.add("blocked", adapter="z")
    bench.step()
    bench.residency.has_room = True
    bench.add("a", [1, 2, 3, 4], adapter="x", max_tokens=12)
    (second,) = bench.add("b", [5, 6, 7], adapter="y", max_tokens=6)
    while not second.num_preemptions:
        bench.step()
    bench.residency.has_room = False
    for _ in range(50):
        bench.step()
    assert bench.ended == ["a", "b"]


def test_a_preempted_row_leaves_the_step_it_was_already_in() -> None:
    bench = Bench(num_blocks=6, block_size=2, tokens=64, prefix_caching=False)
    (first,) = bench.add("a", [1, 2, 3], max_tokens=10)
    bench.add("b", [4, 5, 6], max_tokens=6)
    while bench.scheduler.num_preemptions == 0:
        step = bench.schedule()
        for row in step.rows:
            assert row.sequence.status is Status.RUNNING
            assert len(row.sequence.block_ids) * 2 >= row.start + row.num_tokens
        for row in bench.scheduler.advance(step):
            bench.scheduler.append_token(row.sequence, 7)
    assert [row.sequence for row in step.rows] == [first]


def test_the_contexts_end_bounds_the_output() -> None:
    bench = Bench(model_len=16)
    (sequence,) = bench.add("a", 15, max_tokens=100)
    bench.run()
    assert sequence.num_output_tokens == 1
