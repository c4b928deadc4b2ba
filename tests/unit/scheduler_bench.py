"""A scheduler over a double of the adapter store and an engine that only counts."""

from __future__ import annotations

from collections import Counter

from polyhead_core.errors import PolyheadError
from polyhead_server.kvcache.block_manager import BlockManager
from polyhead_server.request import AdapterVersion, Request, SamplingParams
from polyhead_server.scheduler.scheduler import Scheduler, SchedulerConfig
from polyhead_server.scheduler.sequence import Sequence
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
