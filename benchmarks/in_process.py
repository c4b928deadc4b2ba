"""An engine in this process, without the wire: requests in, tokens out, and what each step was made of.

Built from the server's public parts only (Engine, AdapterStore, ServerConfig, Metrics), so that a benchmark measures
whatever stands behind them.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_server.config import ServerConfig
from polyhead_server.engine.engine import Engine, EngineStatus
from polyhead_server.metrics import Metrics, StepFigures
from polyhead_server.request import Event, FailedEvent, FinishedEvent, Request, SamplingParams, TokensEvent
from polyhead_server.store.store import AdapterInfo, AdapterStore

ANSWER_TIMEOUT_S = 600.0


class StepLog(Metrics):
    """The server's metrics, which also keep every step apart."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[StepFigures] = []

    def step(self, step: StepFigures) -> None:
        super().step(step)
        self.steps.append(step)


@dataclass
class Answer:
    """What one request has brought so far."""

    on_event: Callable[[Answer, Event], None] | None = None
    """Called on the engine's thread, for every event; must not call the engine."""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    """time.monotonic() of the first token."""
    prompt_logprobs: list[float] = field(default_factory=list)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def sink(self, event: Event) -> None:
        if isinstance(event, TokensEvent):
            self.token_ids += event.token_ids
            self.first_token_s = self.first_token_s or time.monotonic()
        elif isinstance(event, FailedEvent):
            self.error = event.error
        elif isinstance(event, FinishedEvent):
            self.prompt_logprobs = [one.logprob for one in event.prompt_logprobs]
        if self.on_event is not None:
            self.on_event(self, event)
        if isinstance(event, FinishedEvent | FailedEvent):
            self.done.set()

    def result(self, timeout_s: float = ANSWER_TIMEOUT_S) -> list[int]:
        """All tokens, once the request has ended. Raises what it failed with, or TimeoutError."""
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"no end of the request within {timeout_s:g} s")
        if self.error is not None:
            raise self.error
        return self.token_ids


def load_adapter(store: AdapterStore, name: str) -> AdapterInfo:
    """Waits until the adapter is in the device pool. Raises what its load raised, or TimeoutError."""
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline_s:
        info = store.try_load(name)
        if info is not None:
            return info
        time.sleep(0.005)
    raise TimeoutError(f"adapter {name} is not loaded after {ANSWER_TIMEOUT_S:g} s")


class InProcessEngine:
    """A running engine with its store, and the log of its steps."""

    def __init__(self, backbone: Backbone, config: ServerConfig) -> None:
        self.backbone = backbone
        self.config = config
        self.metrics = StepLog()
        self.store = AdapterStore.for_backbone(config, backbone, self.metrics)
        self.engine = Engine(config, backbone, self.store, self.metrics)
        self._ids = itertools.count()

    @property
    def steps(self) -> list[StepFigures]:
        return self.metrics.steps

    @property
    def status(self) -> EngineStatus:
        return self.engine.status()

    @property
    def kv_bytes_per_token(self) -> float:
        return self.engine.kv_cache_bytes / (self.status.kv_blocks_total * self.config.kv_block_size)

    def start(self) -> None:
        self.store.start()
        self.store.refresh()
        self.engine.start()

    def close(self) -> None:
        self.engine.stop()
        self.store.stop()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        *,
        adapter: str | None = None,
        on_event: Callable[[Answer, Event], None] | None = None,
        score: bool = False,
        **sampling: Any,
    ) -> Answer:
        """Hands one request to the engine; `score`: it wants its prompt's log-probabilities in place of new tokens.

        `sampling` are SamplingParams'. Raises what the engine refuses with.
        """
        answer = Answer(on_event)
        request = Request(
            request_id=str(next(self._ids)),
            tenant="default",
            prompt_token_ids=tuple(prompt_token_ids),
            params=SamplingParams(**sampling),
            adapter=None if adapter is None else self.store.resolve(adapter),
            arrival_s=time.monotonic(),
            score_prompt=score,
        )
        self.engine.submit(request, answer.sink)
        return answer


@contextlib.contextmanager
def engine_with(
    adapters: Path | None = None, *, loaded: Backbone | None = None, **settings: Any
) -> Iterator[InProcessEngine]:
    """A running engine over the adapters in a folder. `settings` are ServerConfig's.

    `loaded`: a backbone to take instead of loading the one that the settings name; it belongs to the engine from then
    on. Raises RuntimeError if the engine's thread died.
    """
    config = ServerConfig(adapters="" if adapters is None else str(adapters), **settings)
    cache = Path(config.cache_dir) if config.cache_dir else None
    backbone = loaded or load_backbone(
        config.backbone, quantization=config.quantization, dtype=config.dtype, device=config.device, cache_dir=cache
    )
    running = InProcessEngine(backbone, config)
    running.start()
    try:
        yield running
    finally:
        running.close()
    if not running.status.healthy:
        raise RuntimeError("the engine's thread died: see its log")
