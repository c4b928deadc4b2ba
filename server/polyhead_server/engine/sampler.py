"""Logits to tokens, each row by its own parameters and generator. A row's token never depends on the other rows.

Rows are therefore worked on one by one but for the plain argmax, and with NumPy on the host: one row is too little work
for torch's threads, which wait for each other where the cores are busy. L rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyhead_core.errors import EngineFailure
from polyhead_core.kernels import dispatch
from polyhead_server.engine.logprobs import token_logprobs
from polyhead_server.request import SamplingParams, TokenLogprob

_MIN_TEMPERATURE = 1e-30
"""Below this float32 would divide 0 by 0; the draw has long become the argmax."""
_NUCLEUS_THRESHOLDS = (1e-2, 1e-4, 1e-7)
"""Weights relative to the likeliest, from which top_p looks for its tokens."""

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)
class SamplerRow:
    """What the sampler keeps of one sequence. Its generator goes on from step to step and survives preemption."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and output; a live view of the sequence's own list."""
    num_prompt_tokens: int
    seed: int
    eos_token_ids: Iterable[int]
    end_token_ids: frozenset[int] = field(init=False)
    """Tokens that end the sequence: the stop tokens and, unless ignore_eos, the model's end tokens."""
    _generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        eos = () if self.params.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset(eos) | frozenset(self.params.stop_token_ids)

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def bans_end(self) -> bool:
        return len(self.token_ids) - self.num_prompt_tokens < self.params.min_tokens and bool(self.end_token_ids)

    @property
    def takes_plain_argmax(self) -> bool:
        params = self.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return params.is_greedy and penalties == (1.0, 0.0, 0.0) and not self.bans_end

    def uniform(self) -> float:
        """The next draw from [0, 1)."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None = None
    """Of the unmodified distribution; None unless asked for."""


def sample(logits_LV: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled | EngineFailure]:
    """One token for each row of float32 logits; a row whose logits are not finite gets an error, the others a token."""
    assert len(logits_LV) == len(rows), "one row of logits for each sequence"
    if not rows:
        return []
    likeliest = dispatch.greedy(logits_LV).tolist()
    finite = [token_id >= 0 for token_id in likeliest]
    tokens: dict[int, int] = {}
    for index, row in enumerate(rows):
        if finite[index]:
            plain = row.takes_plain_argmax
            tokens[index] = likeliest[index] if plain else _draw(logits_LV[index].cpu().numpy(), row)
    logprobs = _logprobs(logits_LV, rows, tokens)
    return [
        Sampled(tokens[index], logprobs.get(index))
        if finite[index]
        else EngineFailure("the model's logits are not finite")
        for index in range(len(rows))
    ]


def adjusted(logits_V: Floats, row: SamplerRow) -> Floats:
    """A copy of the logits after penalties and the ban of end tokens; at least one stays finite."""
    params, vocabulary = row.params, len(logits_V)
    logits_V = logits_V.astype(np.float32, copy=True)
    limits = np.finfo(np.float32)

    def known(token_ids: Iterable[int]) -> Ints:
        # Adapters may add prompt tokens that the head does not know.
        ids = np.fromiter(token_ids, dtype=np.int64)
        return ids[(ids >= 0) & (ids < vocabulary)]

    if params.repetition_penalty != 1.0:
        ids_C = known(row.token_ids)  # one that occurs twice is written twice, with the same value
        x_C = logits_V[ids_C].astype(np.float64)
        x_C = np.where(x_C > 0, x_C / params.repetition_penalty, x_C * params.repetition_penalty)
        logits_V[ids_C] = x_C.clip(limits.min, limits.max)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        ids_C, counts_C = np.unique(known(row.output_token_ids), return_counts=True)
        x_C = logits_V[ids_C] - params.presence_penalty - params.frequency_penalty * counts_C
        logits_V[ids_C] = x_C.clip(limits.min, limits.max)
    if row.bans_end:
        banned = known(row.end_token_ids)
        if len(banned) < vocabulary:
            logits_V[banned] = -np.inf
    return logits_V


def candidates(logits_V: Floats, params: SamplingParams) -> tuple[Ints | None, Floats]:
    """Ids and weights of the tokens that may be drawn at a temperature > 0; the likeliest token has the weight 1.

    Ids None: all tokens in order. The order of filters is temperature, top_k, top_p, min_p, each on what the one before
    left; of equally likely tokens the lower ids are kept.
    """
    temperature = np.float32(max(params.temperature, _MIN_TEMPERATURE))
    # Far from the largest this overflows to minus infinity, whose weight is rightly 0.
    with np.errstate(over="ignore", under="ignore"):
        weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    ids_C: Ints | None = None
    weights_C = weights_V
    if 0 < params.top_k < len(logits_V):
        # By the logits: at a high temperature different ones can round to the same weight.
        kth = np.partition(logits_V, -params.top_k)[-params.top_k]
        ids_C = _likeliest_first(np.flatnonzero(logits_V >= kth), logits_V)[: params.top_k]
        weights_C = weights_V[ids_C]
    if params.top_p < 1.0:
        mass = params.top_p * float(weights_C.sum(dtype=np.float64))
        if ids_C is None:
            ids_C = _likeliest_first(_at_least_nucleus(weights_V, mass), logits_V)
            weights_C = weights_V[ids_C]
        before_C = weights_C.cumsum(dtype=np.float64) - weights_C
        keep = max(1, int(np.count_nonzero(before_C < mass)))
        ids_C, weights_C = ids_C[:keep], weights_C[:keep]
    if params.min_p > 0.0:
        weights_C = np.where(weights_C >= np.float32(params.min_p), weights_C, np.float32(0.0))
    return ids_C, weights_C


def _likeliest_first(ids_C: Ints, logits_V: Floats) -> Ints:
    """Of equal logits the lower id first, as `ids_C` ascend."""
    return ids_C[np.argsort(-logits_V[ids_C], kind="stable")]


def _at_least_nucleus(weights_V: Floats, mass: float) -> Ints:
    """Ascending ids of the tokens above a threshold that together reach `mass` (Holtzman et al. 2020).

    They hold the nucleus, and spare sorting the whole vocabulary where the distribution is not flat.
    """
    for threshold in _NUCLEUS_THRESHOLDS:
        above = weights_V >= threshold
        if float(weights_V[above].sum(dtype=np.float64)) >= mass:
            return np.flatnonzero(above)
    return np.arange(len(weights_V))


def _draw(logits_V: Floats, row: SamplerRow) -> int:
    logits_V = adjusted(logits_V, row)
    if row.params.is_greedy:
        return int(logits_V.argmax())
    ids_C, weights_C = candidates(logits_V, row.params)
    cumulative_C = weights_C.cumsum(dtype=np.float64)
    total = float(cumulative_C[-1])
    # The first candidate whose cumulated weight exceeds the target has a weight of its own; rounding must not reach
    # the total, which none exceeds.
    target = min(row.uniform() * total, math.nextafter(total, 0.0))
    index = int(cumulative_C.searchsorted(target, side="right"))
    return index if ids_C is None else int(ids_C[index])


def _logprobs(logits_LV: Tensor, rows: Sequence[SamplerRow], tokens: dict[int, int]) -> dict[int, TokenLogprob]:
    wanted = {index: row.params.logprobs for index, row in enumerate(rows) if index in tokens}
    num_top = {index: count for index, count in wanted.items() if count is not None}
    if not num_top:
        return {}
    indices = sorted(num_top)
    found = token_logprobs(logits_LV[indices], [tokens[index] for index in indices], max(num_top.values()))
    return {
        index: TokenLogprob(token_id=one.token_id, logprob=one.logprob, top=one.top[: num_top[index]])
        for index, one in zip(indices, found, strict=True)
    }
