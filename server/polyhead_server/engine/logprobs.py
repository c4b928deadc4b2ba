"""Log-probabilities of given tokens and of the likeliest ones. A row's are bitwise the same alone and in a batch.

Letters in names: L rows, V vocabulary, N likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead_core.errors import EngineFailure
from polyhead_server.request import TokenLogprob

_ROWS_AT_ONCE = 64
"""Bounds the memory of the log-probabilities, which are as large as the logits."""


def token_logprobs(logits_LV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """For each row its token's log-probability and the `num_top` likeliest tokens, ties by the lower id.

    For a score: `logits_LV` are those after each prompt token but the last, `token_ids` the prompt's but the first.
    Raises EngineFailure if a logit is not finite.
    """
    assert len(logits_LV) == len(token_ids), "one token for each row of logits"
    if not bool(finite_rows(logits_LV).all()):
        raise EngineFailure("the model's logits are not finite")
    results: list[TokenLogprob] = []
    for start in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[start : start + _ROWS_AT_ONCE]
        # log_softmax works row by row; logsumexp splits a single row between threads and so rounds it otherwise.
        logprobs_LV = torch.log_softmax(logits_LV[start : start + _ROWS_AT_ONCE].float(), dim=-1)
        index_L1 = torch.tensor(ids, device=logprobs_LV.device).unsqueeze(-1)
        own = logprobs_LV.gather(-1, index_L1).squeeze(-1).tolist()
        tops = _top_pairs(logprobs_LV, num_top)
        results += [TokenLogprob(token_id=i, logprob=p, top=top) for i, p, top in zip(ids, own, tops, strict=True)]
    return results


def finite_rows(logits_LV: Tensor) -> Tensor:
    """[L] bool: every logit of the row is a number."""
    # One cheap pass: a sum is finite only if all its terms are. It may overflow, so that doubtful rows are looked at.
    finite_L = logits_LV.sum(dim=-1, dtype=torch.float32).isfinite()
    doubtful = (~finite_L).nonzero().squeeze(-1)
    if len(doubtful):
        finite_L[doubtful] = logits_LV[doubtful].isfinite().all(dim=-1)
    return finite_L


def top_n(values_LV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest values of each row and their ids, [L, n] each: largest first, of equal ones the lower id."""
    num_values = values_LV.shape[-1]
    n = min(n, num_values)
    top_LN, ids_LN = values_LV.topk(min(n + 1, num_values), dim=-1)
    # topk promises nothing about equal values: which of them are within n is settled here, their order below.
    ambiguous = (top_LN[:, n] == top_LN[:, n - 1]).tolist() if n < num_values else [False] * len(values_LV)
    top_LN, ids_LN = top_LN[:, :n], ids_LN[:, :n]
    ids_LN, order_LN = ids_LN.sort(dim=-1)
    top_LN, order_LN = top_LN.gather(-1, order_LN).sort(dim=-1, descending=True, stable=True)
    ids_LN = ids_LN.gather(-1, order_LN)
    for row, is_ambiguous in enumerate(ambiguous):
        if is_ambiguous:
            at_least_C = (values_LV[row] >= top_LN[row, -1]).nonzero().squeeze(-1)
            order_C = values_LV[row][at_least_C].argsort(descending=True, stable=True)
            ids_LN[row] = at_least_C[order_C[:n]]
    return top_LN, ids_LN


def _top_pairs(logprobs_LV: Tensor, n: int) -> list[tuple[tuple[int, float], ...]]:
    if n == 0:
        return [()] * len(logprobs_LV)
    top_LN, ids_LN = top_n(logprobs_LV, n)
    return [tuple(zip(ids, top, strict=True)) for ids, top in zip(ids_LN.tolist(), top_LN.tolist(), strict=True)]
