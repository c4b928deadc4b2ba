"""The same callers for every system: a closed loop whose requests name fine-tunes by Zipf popularity.

Polyhead mixes all outstanding requests. Dedicated or swapped models run in turns: the fine-tune with the most waiting
requests runs until none of its requests is outstanding, and what arrives for it meanwhile joins its batch. That favours
such models' throughput on one machine, at the price of an unbounded wait for the others' callers.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from in_process import Answer, InProcessEngine
from serving_workload import Ask

from polyhead_server.request import Event, FailedEvent, FinishedEvent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    wall_s: float
    output_tokens: int
    num_turns: int
    """Times that another fine-tune's model had to be the running one; 0 where requests are mixed."""
    mean_rows: float
    """Of a step, over all steps."""
    first_tokens: tuple[int, ...]
    """Of each request, in the order asked: evidence that two systems applied the same weights."""

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s


class Turns:
    """Whose requests may run now. Knows no engine: it is told what was asked and what has ended."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.active: str | None = None
        self._waiting: dict[str, list[int]] = {}
        """Requests by fine-tune; the fine-tune whose first request is oldest comes first."""

    def ask(self, fine_tune: str, request: int) -> bool:
        """True: it may run at once. Else it waits for its turn."""
        if fine_tune == self.active:
            return True
        self._waiting.setdefault(fine_tune, []).append(request)
        return False

    def next_turn(self) -> Sequence[int]:
        """Called when nothing runs: the requests of the next fine-tune, or none if none wait.

        The one with the most requests; of several, the one that has waited longest.
        """
        if not self._waiting:
            return ()
        self.active = max(self._waiting, key=lambda fine_tune: len(self._waiting[fine_tune]))
        self.num_turns += 1
        return self._waiting.pop(self.active)


EngineOf = Callable[[str], InProcessEngine]


def mixed(engine: InProcessEngine, asks: Sequence[Ask], concurrency: int) -> Outcome:
    """All outstanding requests at once, each naming its adapter: what Polyhead is for."""
    return _closed_loop(asks, concurrency, lambda ask: (engine, ask.adapter), [engine], None)


def in_turns(engine_of: EngineOf, engines: Sequence[InProcessEngine], asks: Sequence[Ask], concurrency: int) -> Outcome:
    """One fine-tune's model at a time; `engine_of` gives the engine that holds it merged."""
    return _closed_loop(asks, concurrency, lambda ask: (engine_of(_name(ask)), None), engines, Turns())


def _name(ask: Ask) -> str:
    assert ask.adapter is not None, "every request here names a fine-tune"
    return ask.adapter


def _closed_loop(
    asks: Sequence[Ask],
    concurrency: int,
    route: Callable[[Ask], tuple[InProcessEngine, str | None]],
    engines: Sequence[InProcessEngine],
    turns: Turns | None,
) -> Outcome:
    # The engine's thread only puts: it holds its lock while it delivers.
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: dict[int, Answer] = {}
    left = iter(range(len(asks)))
    steps_before = {id(engine): len(engine.steps) for engine in engines}
    began_s = time.monotonic()

    def start(request: int) -> None:
        engine, adapter = route(asks[request])

        def on_event(_: Answer, event: Event) -> None:
            if isinstance(event, FinishedEvent | FailedEvent):
                ended.put(request)

        answers[request] = engine.submit(
            asks[request].prompt,
            adapter=adapter,
            on_event=on_event,
            max_tokens=asks[request].output_tokens,
            ignore_eos=True,
        )

    def call() -> int:
        """One caller asks its next request; returns how many began to run."""
        request = next(left, None)
        if request is None:
            return 0
        if turns is None or turns.ask(_name(asks[request]), request):
            start(request)
            return 1
        return 0

    running = sum(call() for _ in range(concurrency))
    while True:
        if running == 0 and turns is not None:
            for request in turns.next_turn():
                start(request)
                running += 1
        if running == 0:
            break
        answers[ended.get()].result()
        running += call() - 1
    wall_s = time.monotonic() - began_s
    return Outcome(
        wall_s=wall_s,
        output_tokens=sum(len(answer.token_ids) for answer in answers.values()),
        num_turns=0 if turns is None else turns.num_turns,
        mean_rows=_mean_rows(engines, steps_before),
        first_tokens=tuple(answers[request].token_ids[0] for request in range(len(asks))),
    )


def _mean_rows(engines: Sequence[InProcessEngine], steps_before: Mapping[int, int]) -> float:
    rows = [step.rows for engine in engines for step in engine.steps[steps_before[id(engine)] :]]
    return sum(rows) / len(rows)
