"""Logits to tokens, each row by its own parameters and generator. A row's token never depends on the other rows.

L rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polyhead_core.errors import EngineFailure
from polyhead_core.kernels import dispatch
from polyhead_core.kernels.draw import Draw
from polyhead_server.engine.logprobs import token_logprobs
from polyhead_server.request import SamplingParams, TokenLogprob

_MIN_TEMPERATURE = 1e-30
"""Below this float32 would divide 0 by 0; the draw has long become the argmax."""

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
    _penalizes: bool = field(init=False)
    _generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        eos = () if self.params.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset(eos) | frozenset(self.params.stop_token_ids)
        penalties = (self.params.repetition_penalty, self.params.presence_penalty, self.params.frequency_penalty)
        self._penalizes = penalties != (1.0, 0.0, 0.0)

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def bans_end(self) -> bool:
        return len(self.token_ids) - self.num_prompt_tokens < self.params.min_tokens and bool(self.end_token_ids)

    @property
    def adjusts_logits(self) -> bool:
        return self._penalizes or self.bans_end

    @property
    def takes_argmax(self) -> bool:
        """Of the logits as they are."""
        return self.params.is_greedy and not self.adjusts_logits

    def next_draw(self) -> Draw:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        params = self.params
        return Draw(max(params.temperature, _MIN_TEMPERATURE), params.top_k, params.top_p, params.min_p, uniform)


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
    tokens: list[int] = dispatch.greedy(logits_LV).tolist()  # -1: not finite
    special = [index for index, row in enumerate(rows) if not row.takes_argmax and tokens[index] >= 0]
    if special:
        for index, token_id in _special_tokens(logits_LV, rows, special).items():
            tokens[index] = token_id
    asked = [index for index, row in enumerate(rows) if row.params.logprobs is not None and tokens[index] >= 0]
    logprobs = _logprobs(logits_LV, rows, tokens, asked) if asked else {}
    return [
        Sampled(token_id, logprobs.get(index)) if token_id >= 0 else EngineFailure("the model's logits are not finite")
        for index, token_id in enumerate(tokens)
    ]


def _special_tokens(logits_LV: Tensor, rows: Sequence[SamplerRow], indices: Sequence[int]) -> dict[int, int]:
    """Of the rows `indices`, which do not take the plain argmax."""
    logits = _rows_on_host(logits_LV, indices)
    tokens: dict[int, int] = {}
    drawn: list[tuple[int, Tensor, Draw]] = []
    for index, logits_V in zip(indices, logits, strict=True):
        row = rows[index]
        if row.adjusts_logits:
            logits_V = torch.from_numpy(adjusted(logits_V.numpy(), row))
        if row.params.is_greedy:
            # Of equal ones the lowest id, which torch's argmax does not promise.
            tokens[index] = int(logits_V.numpy().argmax())
        else:
            drawn.append((index, logits_V, row.next_draw()))
    found = dispatch.draw([logits_V for _, logits_V, _ in drawn], [draw for *_, draw in drawn])
    return tokens | {index: token for (index, *_), token in zip(drawn, found, strict=True)}


def _rows_on_host(logits_LV: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The rows `indices`: views of them where they are there, else one copy."""
    if logits_LV.device.type == "cpu":
        return [logits_LV[index] for index in indices]
    rows = logits_LV[list(indices)]
    # Through memory that the device writes to by itself: several times as fast as into any other.
    return list(torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows))


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


def _logprobs(
    logits_LV: Tensor, rows: Sequence[SamplerRow], tokens: Sequence[int], indices: Sequence[int]
) -> dict[int, TokenLogprob]:
    """Of the rows `indices`, which ask for them."""
    num_top = {index: rows[index].params.logprobs or 0 for index in indices}
    found = token_logprobs(logits_LV[list(indices)], [tokens[index] for index in indices], max(num_top.values()))
    return {
        index: TokenLogprob(token_id=one.token_id, logprob=one.logprob, top=one.top[: num_top[index]])
        for index, one in zip(indices, found, strict=True)
    }
