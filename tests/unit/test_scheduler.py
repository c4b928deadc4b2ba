"""Admission, batching, preemption, adapter waits and ends, one rule at a time."""

from __future__ import annotations

from collections import Counter

import pytest

from polyhead_core.errors import (
    AdapterFormatError,
    InvalidRequest,
    PolyheadError,
    PromptTooLong,
    QueueFull,
    RequestDeadlineExceeded,
)
from polyhead_server.kvcache.block_manager import BlockManager
from polyhead_server.request import AdapterVersion, Request, SamplingParams
from polyhead_server.scheduler.scheduler import Scheduler, SchedulerConfig
from polyhead_server.scheduler.sequence import NO_SLOT, Sequence, Status
from polyhead_server.scheduler.step import Step


class FakeResidency:
    """`resident` adapters can be pinned; all others are on their way until a test puts them in, or have failed."""

    def __init__(self, *resident: str) -> None:
        self.resident = list(resident)
        self.failures: dict[str, PolyheadError] = {}
        self.pins: Counter[AdapterVersion] = Counter()
        self.asked: list[str] = []
        self.has_room = False

    def lacks_room(self, version: AdapterVersion) -> bool:
        return not self.has_room and version.content_hash not in self.resident

    def acquire(self, version: AdapterVersion) -> int | None:
        self.asked.append(version.content_hash)
        if version.content_hash not in self.resident:
            return None
        self.pins[version] += 1
        return self.resident.index(version.content_hash)

    def release(self, version: AdapterVersion) -> None:
        assert self.pins[version] > 0, "released without a pin"
        self.pins[version] -= 1

    def failure(self, version: AdapterVersion) -> PolyheadError | None:
        return self.failures.get(version.content_hash)


class Bench:
    """A scheduler with an engine that generates token 7 until `max_tokens`."""

    def __init__(
        self,
        *resident: str,
        num_blocks: int = 64,
        block_size: int = 4,
        rows: int = 8,
        tokens: int = 32,
        queued: int = 100,
        model_len: int = 128,
        wait_s: float = 2.0,
        prefix_caching: bool = True,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.residency = FakeResidency(*resident)
        config = SchedulerConfig(
            max_batch_rows=rows,
            max_batch_tokens=tokens,
            max_queued_requests=queued,
            max_model_len=model_len,
            max_adapter_wait_s=wait_s,
        )
        self.scheduler = Scheduler(config, self.blocks, self.residency)
        self.now_s = 0.0
        self.ended: list[str] = []

    def add(
        self,
        request_id: str,
        prompt: int | list[int] = 5,
        adapter: str | None = None,
        max_tokens: int = 4,
        n: int = 1,
        seed: int | None = None,
        deadline_s: float | None = None,
        score: bool = False,
    ) -> list[Sequence]:
        tokens = [100 + len(request_id) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        return self.scheduler.add(
            Request(
                request_id=request_id,
                tenant="t",
                prompt_token_ids=tuple(tokens),
                params=SamplingParams(max_tokens=max_tokens, n=n, seed=seed),
                adapter=None if adapter is None else AdapterVersion(name=adapter, content_hash=adapter),
                arrival_s=self.now_s,
                deadline_s=deadline_s,
                score_prompt=score,
            )
        )

    def schedule(self) -> Step:
        step = self.scheduler.schedule(self.now_s)
        self.check()
        return step

    def step(self) -> dict[str, int]:
        """One whole step; tokens computed by request."""
        step = self.schedule()
        computed: Counter[str] = Counter()
        for row in step.rows:
            computed[row.sequence.request.request_id] += row.num_tokens
        for row in self.scheduler.advance(step):
            sequence = row.sequence
            if row.samples:
                self.scheduler.append_token(sequence, 7)
            if (not row.samples or sequence.is_at_limit) and self.scheduler.finish(sequence):
                self.ended.append(sequence.request.request_id)
        self.ended += [request.request_id for request, _ in step.failed]
        self.check()
        self.now_s += 1.0
        return dict(computed)

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert +self.residency.pins == self.scheduler.pins()

    def run(self, most_steps: int = 200) -> None:
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.blocks.num_used == 0


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


def test_the_contexts_end_bounds_the_output() -> None:
    bench = Bench(model_len=16)
    (sequence,) = bench.add("a", 15, max_tokens=100)
    bench.run()
    assert sequence.num_output_tokens == 1
