"""What a request is once it has left the wire: plain data, shared by all layers. No torch, no protobuf."""

from __future__ import annotations

import enum
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field

from polyhead_core.errors import InvalidRequest, PolyheadError


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """One immutable version of an adapter. Two versions are the same if and only if their hashes are."""

    name: str
    """The name it was asked by; a label, never a cache key."""
    content_hash: str
    """SHA-256 of its configuration and weights, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Validated at construction; raises InvalidRequest naming the field.

    The order is: penalties, min_tokens' ban, temperature, top_k, top_p, min_p, draw. Log-probabilities
    are those of the unmodified distribution.
    """

    max_tokens: int = 128
    """Most tokens generated for each continuation; the context's end bounds it too."""
    min_tokens: int = 0
    """End and stop tokens are banned before this many."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """The smallest set of tokens whose probability reaches p; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output (CTRL, Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted for each occurrence in the output."""
    seed: int | None = None
    """Fixes the draws, whatever else is in the batch; continuation i uses seed + i. None: drawn at submission."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities; N: the sampled token's and the N likeliest ones'."""
    n: int = 1
    """Independent continuations of one prompt."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                given = reprlib.repr(getattr(self, name))  # whole texts may be megabytes
                raise InvalidRequest(
                    f"{name} = {given} is not usable: expected {expected}",
                    details={"field": name, "given": given, "expected": expected},
                )

        check("max_tokens", 1 <= self.max_tokens <= 2**31 - 1, "1 to 2**31 - 1")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens = {self.max_tokens}")
        # A NaN fails every one of these comparisons, as it should.
        check("temperature", 0.0 <= self.temperature <= 100.0, "0 (greedy) to 100")
        check("top_k", 0 <= self.top_k <= 2**31 - 1, "0 (off) to 2**31 - 1")
        check("top_p", 0.0 < self.top_p <= 1.0, "more than 0, at most 1 (off)")
        check("min_p", 0.0 <= self.min_p <= 1.0, "0 (off) to 1")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "0.01 to 100; 1 is off")
        check("presence_penalty", -100.0 <= self.presence_penalty <= 100.0, "-100 to 100; 0 is off")
        check("frequency_penalty", -100.0 <= self.frequency_penalty <= 100.0, "-100 to 100; 0 is off")
        check("seed", self.seed is None or 0 <= self.seed < 2**64, "0 to 2**64 - 1")
        check(
            "stop",
            len(self.stop) <= 16 and all(0 < len(s) <= 1024 for s in self.stop),
            "at most 16 texts of 1 to 1024 characters",
        )
        check("stop_token_ids", len(self.stop_token_ids) <= 64, "at most 64 token ids")
        check("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more")
        check("n", self.n >= 1, "1 or more")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class FinishReason(enum.Enum):
    STOP = "stop"
    """End token, stop token or stop string."""
    LENGTH = "length"
    """max_tokens, or the context's end."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One token's natural log-probability, and the likeliest tokens at its position, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One admitted call, immutable. The engine keeps its changing state in `Sequence` objects, one per continuation."""

    request_id: str
    """Unique among the requests alive."""
    tenant: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterVersion | None = None
    """None: the backbone alone."""
    arrival_s: float
    """time.monotonic() at admission."""
    deadline_s: float | None = None
    """time.monotonic() after which the request fails with RequestDeadlineExceeded."""
    score_prompt: bool = False
    """Score the prompt's tokens and generate nothing."""
    score_top: int = 0
    """With score_prompt: how many likeliest tokens to report for each position."""


# What the engine says about a request. Every admitted request ends in exactly one Finished or Failed.


@dataclass(frozen=True, kw_only=True)
class TokensEvent:
    """New output of continuation `index`: text of whole characters, and the tokens behind it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChoiceFinish:
    index: int
    reason: FinishReason
    stop: str | None = None
    """The stop string that was met."""


@dataclass(frozen=True, kw_only=True)
class FinishedEvent:
    choices: tuple[ChoiceFinish, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With score_prompt: one for each prompt token but the first."""


@dataclass(frozen=True, kw_only=True)
class FailedEvent:
    """The terminal event of a request that was cancelled, ran out of time or met a bug: `error` says which."""

    error: PolyheadError


Event = TokensEvent | FinishedEvent | FailedEvent
EventSink = Callable[[Event], None]
"""Called from the engine's thread; must neither block nor raise."""
