"""What the scheduler decided for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from polyhead_core.errors import PolyheadError
from polyhead_server.request import Request
from polyhead_server.scheduler.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRow:
    """Tokens [start, start + num_tokens) of `sequence` are computed in this step; its blocks cover them already."""

    sequence: Sequence
    start: int
    num_tokens: int
    reaches_end: bool
    """The last of these tokens is the last known one: a generating row gets a new token from its logits."""

    @property
    def token_ids(self) -> Tokens[int]:
        return self.sequence.token_ids[self.start : self.start + self.num_tokens]

    @property
    def samples(self) -> bool:
        """True if the logits of the row's last token are to be sampled from."""
        return self.reaches_end and not self.sequence.request.score_prompt

    @property
    def is_decode(self) -> bool:
        """True for the one new token of a sequence that is past its prefill."""
        return self.num_tokens == 1 and self.reaches_end and self.sequence.num_output_tokens > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    rows: tuple[ScheduledRow, ...]
    """Decodes first; rows of any adapters side by side. Empty when there is nothing to compute now."""
    failed: tuple[tuple[Request, PolyheadError], ...]
    """Requests that ended here, with all their continuations: the caller owes each its FailedEvent."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(slots=True)
class Draft:
    """A step in the making."""

    budget: int
    rows: dict[int, ScheduledRow] = field(default_factory=dict)  # by the sequence's ordinal, in order of scheduling
    preempted: bool = False

    def add(self, sequence: Sequence) -> None:
        num_tokens = min(sequence.num_uncomputed_tokens, self.budget)
        assert num_tokens >= 1
        self.budget -= num_tokens
        self.rows[sequence.ordinal] = ScheduledRow(
            sequence=sequence,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            reaches_end=num_tokens == sequence.num_uncomputed_tokens,
        )

    def drop(self, sequence: Sequence) -> None:
        self.preempted = True
        row = self.rows.pop(sequence.ordinal, None)
        if row is not None:
            self.budget += row.num_tokens
