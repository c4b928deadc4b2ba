"""What the client returns: plain frozen dataclasses. Knows nothing of gRPC or protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of every generating call. Absent or None: the server's default, named beside it."""

    max_tokens: int | None
    """128; bounded by the context that is left."""
    min_tokens: int | None
    """0; no end token before this many."""
    temperature: float | None
    """0: greedy."""
    top_k: int | None
    """0: off."""
    top_p: float | None
    """1: off."""
    min_p: float | None
    """0: off."""
    repetition_penalty: float | None
    """1: off."""
    presence_penalty: float | None
    """0: off."""
    frequency_penalty: float | None
    """0: off."""
    seed: int | None
    """None: drawn by the server."""
    stop: str | Sequence[str] | None
    """The text ends before the first of these."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    """None: none; N: each token's and the N likeliest ones'."""
    n: int | None
    """1; independent continuations."""


class Message(TypedDict):
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, kw_only=True)
class AdapterIdentity:
    name: str
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Over all continuations."""
    cached_prompt_tokens: int
    """Prompt tokens that the server had computed before."""


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float
    """Natural logarithm, of the unmodified distribution."""
    top: tuple[TopLogprob, ...] = ()
    """The likeliest tokens here, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New output of continuation `index`. The texts of its chunks, joined, are its text."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = field(repr=False, default=())
    finish_reason: str
    """`stop` or `length`."""
    stop: str | None = None
    """The stop string that was met, if one was."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    request_id: str
    adapter: AdapterIdentity | None
    """The weights that answered; None: the backbone alone."""
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first continuation, like the other properties."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class Score:
    adapter: AdapterIdentity | None
    tokens: tuple[TokenLogprob, ...]
    """The first token has no context: its logprob is 0 and not counted."""
    total_logprob: float
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class Adapter:
    name: str
    content_hash: str
    peft_type: str
    max_rank: int
    num_parameters: int
    file_bytes: int
    device_bytes: int
    residency: str
    """`disk`, `host`, `loading` or `device`."""
    pinned: bool
    active_requests: int
    error: str
    """Why the folder's present content is refused; empty: it is not."""


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    source: str
    fingerprint: str
    architecture: str
    quantization: str
    dtype: str
    num_parameters: int
    num_bytes: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_model_len: int
    max_batch_rows: int
    max_batch_tokens: int
    max_queued_requests: int
    max_adapter_rank: int
    max_n: int
    max_logprobs: int


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    server_version: str
    backbone: BackboneInfo
    limits: Limits
    num_kv_blocks: int
    kv_block_size: int
    kv_cache_bytes: int
    adapter_pool_bytes: int
    adapter_pool_used_bytes: int
    num_adapters: int
    draining: bool
