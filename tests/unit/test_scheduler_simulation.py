"""Long random lives of the scheduler with too few blocks, slots and rows: nothing lost, starved, leaked or mixed up."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import pytest

from polyhead_core.errors import AdapterFormatError, InvalidRequest, PolyheadError, QueueFull
from polyhead_server.kvcache.block_manager import BlockManager
from polyhead_server.request import AdapterVersion, Request, SamplingParams
from polyhead_server.scheduler.scheduler import Scheduler, SchedulerConfig
from polyhead_server.scheduler.sequence import Sequence, Status
from polyhead_server.scheduler.step import ScheduledRow, Step


@dataclass
class SmallPool:
    """Adapter slots with pins, LRU eviction and loads that take some steps; `broken` adapters fail after their load."""

    num_slots: int
    load_steps: int
    broken: frozenset[str]
    resident: OrderedDict[str, int] = field(default_factory=OrderedDict)
    loading: dict[str, int] = field(default_factory=dict)  # steps to go
    pins: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)

    def acquire(self, version: AdapterVersion) -> int | None:
        key = version.content_hash
        if key in self.resident:
            self.pins[key] += 1
            self.resident.move_to_end(key)
            return self.resident[key]
        if key not in self.loading and key not in self.failed and self._make_room():
            self.loading[key] = self.load_steps
        return None

    def _make_room(self) -> bool:
        if len(self.resident) + len(self.loading) < self.num_slots:
            return True
        idle = next((key for key in self.resident if not self.pins[key]), None)
        if idle is None:
            return False
        del self.resident[idle]
        return True

    def lacks_room(self, version: AdapterVersion) -> bool:
        return not {version.content_hash} & (self.resident.keys() | self.loading.keys() | self.failed)

    def release(self, version: AdapterVersion) -> None:
        assert self.pins[version.content_hash] > 0, "released without a pin"
        self.pins[version.content_hash] -= 1

    def failure(self, version: AdapterVersion) -> PolyheadError | None:
        return AdapterFormatError("broken") if version.content_hash in self.failed else None

    def tick(self) -> None:
        for key in list(self.loading):
            self.loading[key] -= 1
            if self.loading[key] <= 0:
                del self.loading[key]
                if key in self.broken:
                    self.failed.add(key)
                else:
                    self.resident[key] = min(set(range(self.num_slots)) - set(self.resident.values()))


class Simulation:
    """Plays the engine. The model is a hash chain: a KV cell names its owner, its adapter and the whole prefix."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.blocks = BlockManager(rng.randint(6, 40), rng.choice([1, 2, 4, 8]), rng.random() < 0.8)
        self.pool = SmallPool(rng.randint(1, 3), rng.randint(1, 4), frozenset({"h7"}))
        self.config = SchedulerConfig(
            max_batch_rows=rng.randint(1, 8),
            max_batch_tokens=rng.randint(1, 24),
            max_queued_requests=12,
            max_model_len=48,
            max_adapter_wait_s=rng.choice([0.0, 3.0, 10.0]),
        )
        self.scheduler = Scheduler(self.config, self.blocks, self.pool)
        self.cells: dict[tuple[int, int], int] = {}
        self.ends: Counter[str] = Counter()
        self.admitted: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.now_s = 0.0

    def submit(self) -> None:
        rng = self.rng
        adapter = rng.choice([None, *(f"h{i}" for i in range(8))])
        request = Request(
            request_id=f"r{len(self.admitted)}",
            tenant=rng.choice("ab"),
            prompt_token_ids=tuple(rng.randrange(2) for _ in range(rng.randint(1, 30))),
            params=SamplingParams(max_tokens=rng.randint(1, 20), n=rng.choice([1, 1, 1, 2, 4])),
            adapter=None if adapter is None else AdapterVersion(name=adapter, content_hash=adapter),
            arrival_s=self.now_s,
            deadline_s=None if rng.random() < 0.8 else self.now_s + rng.uniform(0, 60),
            score_prompt=rng.random() < 0.1,
        )
        try:
            self.scheduler.add(request)
        except (QueueFull, InvalidRequest):
            return
        self.admitted[request.request_id] = request

    def step(self, may_abort: bool = True) -> Step:
        step = self.scheduler.schedule(self.now_s)
        self.check()
        assert step.num_tokens <= self.config.max_batch_tokens
        assert len({row.sequence.ordinal for row in step.rows}) == len(step.rows) <= self.config.max_batch_rows
        for request, _ in step.failed:
            self.ends[request.request_id] += 1
        if may_abort and self.admitted and self.rng.random() < 0.05:
            self.abort()
        for row in step.rows:
            if row.sequence.status is Status.RUNNING:
                self.compute(row)
        for row in self.scheduler.advance(step):
            self.sample(row.sequence)
        self.check()
        self.pool.tick()
        self.now_s += 1.0
        return step

    def abort(self) -> None:
        request_id = self.rng.choice(list(self.admitted))
        assert self.scheduler.abort(request_id) == (self.ends[request_id] == 0)
        self.ends[request_id] = 1

    def compute(self, row: ScheduledRow) -> None:
        sequence, size = row.sequence, self.blocks.block_size
        assert row.num_tokens >= 1
        assert not (sequence.request.score_prompt and sequence.num_computed_tokens < row.start)
        if sequence.request.adapter is not None:
            assert self.pool.resident[sequence.request.adapter.content_hash] == sequence.slot, "evicted under a pin"
        state = hash((sequence.request.tenant, sequence.adapter_hash))
        for position in range(row.start + row.num_tokens):
            state = hash((state, sequence.token_ids[position]))
            cell = (sequence.block_ids[position // size], position % size)
            if position < row.start:
                assert self.cells[cell] == state, "foreign KV"
            else:
                self.cells[cell] = state

    def sample(self, sequence: Sequence) -> None:
        if not sequence.request.score_prompt:
            self.scheduler.append_token(sequence, self.rng.randrange(2))
            key = (sequence.request.request_id, sequence.index)
            self.outputs.setdefault(key, []).append(sequence.token_ids[-1])
            assert self.outputs[key] == list(sequence.output_token_ids), "preemption lost output"
            if not sequence.is_at_limit and self.rng.random() > 0.05:
                return
        if self.scheduler.finish(sequence):
            self.ends[sequence.request.request_id] += 1

    def check(self) -> None:
        self.scheduler.check_integrity()
        held = Counter({version.content_hash: count for version, count in self.scheduler.pins().items()})
        assert +self.pool.pins == held


@pytest.mark.parametrize("seed", range(24))
def test_every_request_ends_exactly_once_and_nothing_leaks(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(400):
        if simulation.rng.random() < 0.3:
            simulation.submit()
        simulation.step()
    for _ in range(5000):
        if not simulation.scheduler.has_work:
            break
        simulation.step(may_abort=False)
    assert simulation.admitted
    assert simulation.ends == Counter(dict.fromkeys(simulation.admitted, 1))
    assert not simulation.scheduler.has_work
    assert simulation.blocks.num_used == 0
    assert not +simulation.pool.pins
    simulation.blocks.check_integrity([])


@pytest.mark.parametrize("wait_s", [0.0, 5.0, 30.0])
def test_an_adapter_is_not_starved_by_a_stream_of_others(wait_s: float) -> None:
    """One slot, always pinned by an endless stream for another adapter: the one in between still gets its turn."""
    pool = SmallPool(1, 1, frozenset())
    config = SchedulerConfig(
        max_batch_rows=4, max_batch_tokens=16, max_queued_requests=1000, max_model_len=64, max_adapter_wait_s=wait_s
    )
    scheduler = Scheduler(config, BlockManager(64, 4), pool)

    def submit(name: str, adapter: str, now_s: float) -> None:
        version = AdapterVersion(name=adapter, content_hash=adapter)
        params = SamplingParams(max_tokens=6)
        request = Request(
            request_id=name, tenant="t", prompt_token_ids=(1, 2, 3), params=params, adapter=version, arrival_s=now_s
        )
        scheduler.add(request)

    started_s = None
    for tick in range(120):
        submit(f"stream{tick}", "popular", tick)
        if tick == 20:
            submit("rare", "rare", tick)
        for row in scheduler.advance(scheduler.schedule(float(tick))):
            if row.sequence.request.request_id == "rare" and started_s is None:
                started_s = tick
            scheduler.append_token(row.sequence, 1)
            if row.sequence.is_at_limit:
                scheduler.finish(row.sequence)
        scheduler.check_integrity()
        pool.tick()
    assert started_s is not None, "starved"
    # Its place in the queue, its wait, and the drain of what was running then.
    assert started_s <= 20 + 20 + wait_s + 12


def test_the_earliest_is_never_preempted() -> None:
    simulation = Simulation(3)
    scheduler = Scheduler(simulation.config, BlockManager(12, 2), simulation.pool)
    for index in range(8):
        params = SamplingParams(max_tokens=16)
        scheduler.add(
            Request(request_id=f"r{index}", tenant="t", prompt_token_ids=(1, 2, 3), params=params, arrival_s=0.0)
        )
    preempted: Counter[int] = Counter()
    order = []
    for tick in range(1000):
        if not scheduler.has_work:
            break
        for row in scheduler.advance(scheduler.schedule(float(tick))):
            preempted[row.sequence.ordinal] = row.sequence.num_preemptions
            scheduler.append_token(row.sequence, row.sequence.ordinal)
            if row.sequence.is_at_limit:
                scheduler.finish(row.sequence)
                order.append(row.sequence.ordinal)
    assert order[0] == 0
    assert preempted[0] == 0
    assert sorted(order) == list(range(8))
