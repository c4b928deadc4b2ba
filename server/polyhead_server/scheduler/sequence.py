"""The changing state of one continuation of a request. Changed by the scheduler alone; read by the engine."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from polyhead_server.kvcache.block_manager import BlockTable
from polyhead_server.request import Request

NO_SLOT = -1
"""The slot of a sequence that runs on the backbone alone, or that holds no pin."""


class Status(enum.Enum):
    WAITING = "waiting"
    """Holds neither blocks nor a pin."""
    RUNNING = "running"
    FINISHED = "finished"
    """Ended in any way: finished, cancelled, failed."""


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    request: Request
    index: int
    """Which of the request's continuations."""
    ordinal: int
    """Place in the line of arrival; unique."""
    seed: int
    """Of this continuation's draws: given + index, or drawn at admission."""
    max_total_tokens: int
    """Prompt and output end here: by max_tokens or by the context's end."""
    table: BlockTable
    token_ids: list[int] = field(default_factory=list)
    """Prompt and output; output survives preemption."""
    num_computed_tokens: int = 0
    """Leading tokens whose KV is in the blocks."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared at the first admission."""
    status: Status = Status.WAITING
    slot: int = NO_SLOT
    num_preemptions: int = 0
    waiting_since_s: float = 0.0
    blocked_since_s: float | None = None
    """Since when it has been refused for want of its adapter."""
    first_scheduled_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> Tokens[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def block_ids(self) -> list[int]:
        return self.table.block_ids

    @property
    def is_at_limit(self) -> bool:
        """True when no further token may be appended."""
        return len(self.token_ids) >= self.max_total_tokens

    @property
    def adapter_hash(self) -> str | None:
        return None if self.request.adapter is None else self.request.adapter.content_hash
