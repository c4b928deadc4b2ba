"""Polyhead's own engine in this process, without the wire: what a server computes, asked through Engine.submit."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from protocol import Reply, RowTimes, serve

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import EngineFailure
from polyhead_server.config import ServerConfig
from polyhead_server.engine.engine import Engine
from polyhead_server.metrics import Metrics
from polyhead_server.request import Event, FailedEvent, FinishedEvent, Request, SamplingParams, TokensEvent
from polyhead_server.store.store import AdapterStore

sys.path.insert(0, str(Path(__file__).parents[1]))  # this is a script: its own folder is the one on the path

from in_process import load_adapter

MARGIN_TOKENS = 16
"""Tokens beyond the measured window, so that rows which began early still run at its end."""
ANSWER_TIMEOUT_S = 600.0


@dataclass
class _Row:
    """One request's tokens and times. Its sink runs in the engine's thread and does no more than note them."""

    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def sink(self, event: Event) -> None:
        if isinstance(event, TokensEvent):
            self.times_s += [time.perf_counter()] * len(event.token_ids)
            self.token_ids += event.token_ids
        elif isinstance(event, FinishedEvent | FailedEvent):
            self.failure = event.error if isinstance(event, FailedEvent) else None
            self.ended.set()


class Polyhead:
    def load(self, settings: dict[str, Any], warm_adapters: list[str]) -> Reply:
        """`settings` are ServerConfig's; `warm_adapters` are in the device pool when this returns."""
        config = ServerConfig(**settings)
        backbone = load_backbone(config.backbone, quantization=config.quantization, dtype=config.dtype)
        metrics = Metrics()
        self._store = AdapterStore.for_backbone(config, backbone, metrics)
        self._engine = Engine(config, backbone, self._store, metrics)
        self._store.start()
        self._store.refresh()
        self._engine.start()
        self._folder = Path(config.adapters)
        self._warm_adapters = warm_adapters
        self._num_adapters = len(self._store.list())
        self._load_warm()
        self._ids = itertools.count()
        registered = {"registered_adapters": self._num_adapters, "loaded_adapters": len(warm_adapters)}
        return {
            "versions": {"torch": torch.__version__},
            "settings": {**settings, **registered, "threads": config.num_threads or torch.get_num_threads()},
        }

    def register(self, adapters: bool) -> Reply:
        """All adapters of the folder, or none of them: it is put aside."""
        aside = self._folder.with_name(self._folder.name + ".aside")
        if adapters and aside.exists():
            aside.rename(self._folder)
        elif not adapters and self._folder.exists():
            self._folder.rename(aside)
        self._store.refresh()
        registered = len(self._store.list())
        if registered != (self._num_adapters if adapters else 0):
            raise RuntimeError(f"{registered} adapters are registered")
        if adapters:
            self._load_warm()
        return {"registered_adapters": registered}

    def _load_warm(self) -> None:
        for name in self._warm_adapters:
            load_adapter(self._store, name)

    def decode(self, prompts: list[list[int]], adapters: list[str | None], steps: int) -> Reply:
        rows = self._generate(prompts, adapters, steps + MARGIN_TOKENS)
        return RowTimes([row.times_s for row in rows]).steady(steps)

    def prefill(self, prompts: list[list[int]]) -> Reply:
        seconds = 0.0
        for prompt in prompts:
            began_s = time.perf_counter()
            (row,) = self._generate([prompt], [None], 1)
            seconds += row.times_s[0] - began_s
        return {"tokens": sum(map(len, prompts)), "seconds": seconds}

    def say(self, prompt: list[int], tokens: int, adapter: str | None) -> Reply:
        (row,) = self._generate([prompt], [adapter], tokens)
        return {"token_ids": row.token_ids}

    def _generate(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], tokens: int) -> list[_Row]:
        rows = [_Row() for _ in prompts]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        for row, prompt, adapter in zip(rows, prompts, adapters, strict=True):
            request = Request(
                request_id=str(next(self._ids)),
                tenant="default",
                prompt_token_ids=tuple(prompt),
                params=params,
                adapter=None if adapter is None else self._store.resolve(adapter),
                arrival_s=time.monotonic(),
            )
            self._engine.submit(request, row.sink)
        for row in rows:
            if not row.ended.wait(ANSWER_TIMEOUT_S):
                raise EngineFailure(f"a request did not end within {ANSWER_TIMEOUT_S:.0f} s: {self._engine.status()}")
            if row.failure is not None:
                raise row.failure
        return rows

    def close(self) -> None:
        self._engine.stop()
        self._store.stop()


if __name__ == "__main__":
    system = Polyhead()
    names = ("load", "register", "decode", "prefill", "say")
    serve({name: getattr(system, name) for name in names})
    system.close()
