"""A row of a step on its way through the engine: what is computed for whom, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyhead_core.errors import EngineFailure
from polyhead_server.engine.batch import BatchRow
from polyhead_server.engine.live import LiveRequest
from polyhead_server.engine.sampler import Sampled
from polyhead_server.request import ChoiceFinish, TokenLogprob, TokensEvent
from polyhead_server.scheduler.step import ScheduledRow


@dataclass(kw_only=True, slots=True)
class Work:
    """One row of a step with copies of what its computation needs, and then with what came of it."""

    row: ScheduledRow
    batch_row: BatchRow
    live: LiveRequest
    targets: Sequence[int]
    sampled: Sampled | None = None
    sampled_s: float = 0.0
    accepted: tuple[TokensEvent, ChoiceFinish | None] | None = None
    """The token's text, where that had to be known at once."""
    ends_request: bool = False
    scores: Sequence[TokenLogprob] = ()
    failure: EngineFailure | None = None
    """The row's own: its request ends, the others of the step go on."""


def named_failure(failure: EngineFailure, one: Work) -> EngineFailure:
    """The row's failure in words for its caller: whose weights yield what is not finite."""
    name = one.live.adapter_name
    owner = f"adapter {name!r}" if name else "the backbone"
    return EngineFailure(f"{owner} yields non-finite numbers here: {failure.message}", details={"adapter": name})
