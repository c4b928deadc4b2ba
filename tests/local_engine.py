"""A real engine in this process, without the wire: submit requests together, wait for all their answers."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_server.config import ServerConfig
from polyhead_server.engine.engine import Engine
from polyhead_server.metrics import Metrics
from polyhead_server.request import Event, FailedEvent, FinishedEvent, Request, SamplingParams, TokensEvent
from polyhead_server.store.store import AdapterStore


@dataclass
class Answer:
    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def sink(self, event: Event) -> None:
        assert not self.done.is_set(), "an event after the terminal one"
        self.events.append(event)
        if isinstance(event, FinishedEvent | FailedEvent):
            self.done.set()

    @property
    def finished(self) -> FinishedEvent:
        assert self.done.wait(120), "no terminal event within 120 s"
        last = self.events[-1]
        if isinstance(last, FailedEvent):
            raise last.error
        assert isinstance(last, FinishedEvent)
        return last

    def tokens(self, index: int = 0) -> list[int]:
        assert self.finished
        events = [e for e in self.events if isinstance(e, TokensEvent) and e.index == index]
        return [token for event in events for token in event.token_ids]

    def text(self, index: int = 0) -> str:
        assert self.finished
        return "".join(e.text for e in self.events if isinstance(e, TokensEvent) and e.index == index)

    @property
    def prompt_logprobs(self) -> list[float]:
        return [one.logprob for one in self.finished.prompt_logprobs]


class LocalEngine:
    def __init__(self, backbone: Backbone, config: ServerConfig, *, started: bool = True) -> None:
        """Not `started`: what is submitted before `start` is there together, however slow the machine is."""
        self.metrics = Metrics()
        self.store = AdapterStore.for_backbone(config, backbone, self.metrics)
        self.engine = Engine(config, backbone, self.store, self.metrics)
        self.backbone = backbone
        self._ids = itertools.count()
        self.store.start()
        self.store.refresh()
        if started:
            self.start()

    def start(self) -> None:
        self.engine.start()

    def submit(self, prompt: Sequence[int] | str, adapter: str | None = None, **settings: Any) -> Answer:
        """`settings` are SamplingParams', and Request's score_prompt, score_top, deadline_s."""
        if isinstance(prompt, str):
            prompt = self.backbone.tokenizer(prompt).input_ids
        own = {key: settings.pop(key) for key in ("score_prompt", "score_top", "deadline_s") if key in settings}
        answer = Answer()
        request = Request(
            request_id=str(next(self._ids)),
            tenant="default",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**settings),
            adapter=None if adapter is None else self.store.resolve(adapter),
            arrival_s=time.monotonic(),
            **own,
        )
        self.engine.submit(request, answer.sink)
        return answer

    def close(self) -> None:
        self.engine.stop()
        self.store.stop()


@contextlib.contextmanager
def local_engine(
    source: Path | str,
    cache: Path | None,
    *,
    quantization: str = "int8",
    adapters: Path | None = None,
    started: bool = True,
    **settings: Any,
) -> Iterator[LocalEngine]:
    config = ServerConfig(
        backbone=str(source),
        quantization=quantization,
        adapters="" if adapters is None else str(adapters),
        check_integrity=True,
        **{"kv_cache_bytes": 16 << 20, "adapter_pool_bytes": 64 << 20, "num_threads": 1, **settings},
    )
    backbone = load_backbone(str(source), quantization=quantization, dtype=config.dtype, cache_dir=cache)
    local = LocalEngine(backbone, config, started=started)
    try:
        yield local
    finally:
        local.close()
    local.engine.check_integrity()
    status = local.engine.status()
    assert status.healthy, "the engine's thread died"
    assert (status.kv_blocks_used, local.store.num_pins) == (0, 0), "blocks or pins were not given back"
