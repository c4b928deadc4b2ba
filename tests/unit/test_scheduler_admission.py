"""Who gets into a step and who leaves: adapter waits, failures, deadlines, aborts, and limits of the queue."""

from __future__ import annotations

import pytest
from scheduler_bench import Bench

from polyhead_core.errors import AdapterFormatError, InvalidRequest, PromptTooLong, QueueFull, RequestDeadlineExceeded
from polyhead_server.scheduler.sequence import NO_SLOT, Status


def test_adapters_and_backbone_share_a_step() -> None:
    bench = Bench("x", "y")
    sequences = [*bench.add("a", adapter="x"), *bench.add("bb", adapter="y"), *bench.add("ccc")]
    assert set(bench.step()) == {"a", "bb", "ccc"}
    assert [sequence.slot for sequence in sequences] == [0, 1, NO_SLOT]
    bench.run()
    assert not +bench.residency.pins


def test_an_absent_adapter_blocks_nobody_else() -> None:
    bench = Bench("y")
    bench.add("a", adapter="x")
    bench.add("a2", adapter="x")
    bench.add("b", adapter="y")
    assert list(bench.step()) == ["b"]
    assert bench.residency.asked.count("x") == 1, "asked once a step"
    bench.residency.resident.append("x")
    assert set(bench.step()) == {"a", "a2", "b"}


def test_an_overdue_adapter_holds_back_later_arrivals_only() -> None:
    bench = Bench("y", wait_s=2.0)
    bench.add("early", adapter="y", max_tokens=20)
    bench.step()
    bench.add("blocked", adapter="x")
    for _ in range(3):
        bench.step()
    bench.add("late")
    assert set(bench.step()) == {"early"}
    bench.residency.resident.append("x")
    assert set(bench.step()) == {"early", "blocked", "late"}


def test_an_adapter_that_is_merely_slow_to_read_holds_back_nobody() -> None:
    bench = Bench("y", wait_s=2.0)
    bench.residency.has_room = True
    bench.add("slow", adapter="x")
    for _ in range(5):
        bench.step()
    bench.add("late", adapter="y")
    assert set(bench.step()) == {"late"}
    bench.residency.has_room = False
    bench.step()
    bench.add("later", adapter="y")
    assert "later" in bench.step(), "it waits for room since a moment only"


def test_a_failed_adapter_fails_all_its_requests() -> None:
    bench = Bench("y")
    bench.residency.failures["x"] = AdapterFormatError("truncated")
    bench.add("a", adapter="x", n=2)
    bench.add("b", adapter="x")
    bench.add("c", adapter="y")
    step = bench.schedule()
    assert [(request.request_id, str(error)) for request, error in step.failed] == [
        ("a", "truncated"),
        ("b", "truncated"),
    ]
    assert [row.sequence.request.request_id for row in step.rows] == ["c"]
    bench.scheduler.advance(step)


def test_deadlines_end_waiting_and_running_requests() -> None:
    bench = Bench("x", rows=1)
    bench.add("a", adapter="x", max_tokens=50, deadline_s=3.0, n=2)
    bench.add("b", deadline_s=3.0)
    for _ in range(3):
        bench.step()
    step = bench.schedule()
    assert [request.request_id for request, _ in step.failed] == ["a", "b"]
    assert all(isinstance(error, RequestDeadlineExceeded) for _, error in step.failed)
    assert not step.rows
    assert not bench.scheduler.has_work
    assert bench.blocks.num_used == 0


def test_abort_frees_at_once_and_the_step_on_its_way_ignores_it() -> None:
    bench = Bench("x")
    bench.add("a", adapter="x", n=2)
    bench.add("b", max_tokens=2)
    bench.step()
    step = bench.schedule()
    assert bench.scheduler.abort("a")
    assert not bench.scheduler.abort("a")
    assert not +bench.residency.pins
    bench.scheduler.check_integrity()
    assert [row.sequence.request.request_id for row in bench.scheduler.advance(step)] == ["b"]
    bench.add("a")
    for row in step.rows:
        if row.sequence.status is Status.RUNNING:
            bench.scheduler.append_token(row.sequence, 7)
            bench.scheduler.finish(row.sequence)
    bench.run()


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    bench = Bench(queued=2, rows=1)
    bench.add("a")
    bench.step()
    bench.add("b")
    bench.add("c")
    assert (bench.scheduler.num_waiting, bench.scheduler.num_running) == (2, 1)
    with pytest.raises(QueueFull) as caught:
        bench.add("d")
    assert caught.value.retry_after_s == 1.0
    for _ in range(9):
        bench.step()
    assert len(bench.ended) == 2
    for name in "ef":
        bench.add(name)
    with pytest.raises(QueueFull) as caught:
        bench.add("g")
    assert caught.value.retry_after_s is not None
    assert 0.1 <= caught.value.retry_after_s <= 60
    assert bench.scheduler.oldest_wait_s(bench.now_s + 3) == 3.0
    bench.run()


def test_unusable_lengths_are_refused_with_both_numbers() -> None:
    bench = Bench(model_len=16, num_blocks=3, block_size=4)
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.add("a", [])
    with pytest.raises(PromptTooLong, match=r"16 tokens.*16"):
        bench.add("a", 16, max_tokens=1)
    with pytest.raises(PromptTooLong, match=r"17 tokens.*16"):
        bench.add("a", 17, score=True)
    with pytest.raises(InvalidRequest, match=r"need 4 KV blocks.*has 3"):
        bench.add("a", 10, max_tokens=4)
    with pytest.raises(InvalidRequest, match=r"need 4 KV blocks.*has 3"):
        bench.add("a", 13, score=True)
    assert not bench.scheduler.has_work
    (sequence,) = bench.add("a", 10, max_tokens=3)
    bench.run()
    assert sequence.num_output_tokens == 3
