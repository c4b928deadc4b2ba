"""The sampler against a slow, obvious reference; draws against their distribution; rows against themselves alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from polyhead_core.errors import EngineFailure
from polyhead_core.kernels import dispatch
from polyhead_server.engine.logprobs import token_logprobs, top_n
from polyhead_server.engine.sampler import Sampled, SamplerRow, adjusted, sample
from polyhead_server.request import SamplingParams

EOS = 0


def row_of(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None) -> SamplerRow:
    prompt = [1, 2] if prompt is None else prompt
    return SamplerRow(params, prompt + (output or []), len(prompt), params.seed or 0, (EOS,))


def tokens_of(results: list[Sampled | EngineFailure]) -> list[int]:
    assert all(isinstance(one, Sampled) for one in results), results
    return [one.token_id for one in results if isinstance(one, Sampled)]


def reference_logits(logits: list[float], row: SamplerRow) -> list[float]:
    """Penalties and ban, token by token."""
    params, out = row.params, list(logits)
    output = list(row.output_token_ids)
    for token in range(len(out)):
        if token in row.token_ids:
            out[token] = (
                out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
            )
        if token in output:
            out[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        if len(output) < params.min_tokens and token in row.end_token_ids:
            out[token] = -math.inf
    return out


def reference_probabilities(logits: list[float], params: SamplingParams) -> npt.NDArray[np.float64]:
    """Sort everything, then filter one by one, renormalising each time."""
    x = np.array(logits, dtype=np.float64) / params.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    kept = order[: params.top_k] if params.top_k else order
    p = {token: math.exp(x[token] - x[order[0]]) for token in kept}
    if params.top_p < 1.0:
        total, cumulated, nucleus = sum(p.values()), 0.0, []
        for token in kept:
            nucleus.append(token)
            cumulated += p[token] / total
            if cumulated >= params.top_p:
                break
        p = {token: p[token] for token in nucleus}
    p = {token: value for token, value in p.items() if value >= params.min_p * max(p.values())}
    result = np.zeros(len(x))
    for token, value in p.items():
        result[token] = value / sum(p.values())
    return result


def draws(logits_V: npt.NDArray[np.float32], params: SamplingParams, uniforms: npt.NDArray[np.float64]) -> list[int]:
    how = row_of(params).next_draw()
    row = torch.from_numpy(logits_V)
    return dispatch.draw([row] * len(uniforms), [how._replace(uniform=float(one)) for one in uniforms])


@pytest.mark.parametrize("seed", range(10))
def test_draws_invert_the_references_distribution(seed: int) -> None:
    """The token at `uniform` is the one in whose share of the probabilities, laid end to end, it lies."""
    rng = random.Random(seed)
    generator = np.random.default_rng(seed)
    for _ in range(60):
        size = rng.choice([2, 7, 50, 300])
        logits = (generator.standard_normal(size) * rng.choice([0.1, 1, 5, 30])).astype(np.float32)
        params = SamplingParams(
            temperature=rng.choice([0.2, 0.7, 1.0, 3.0]),
            top_k=rng.choice([0, 0, 1, 3, 20, 1000]),
            top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.93, 0.9999]),
            min_p=rng.choice([0.0, 0.0, 0.02, 0.4]),
        )
        expected = reference_probabilities(logits.tolist(), params)
        cumulated = expected.cumsum()
        uniforms = np.concatenate([[0.0, np.nextafter(1.0, 0.0)], generator.random(60), cumulated - expected / 2])
        uniforms = uniforms[uniforms < 1.0]
        tokens = draws(logits, params, uniforms)
        assert (expected[tokens] > 0).all(), params
        assert (cumulated[tokens] >= uniforms - 1e-5).all(), params
        assert ((cumulated - expected)[tokens] <= uniforms + 1e-5).all(), params
        assert len(set(tokens)) >= np.count_nonzero(expected > 1e-4), params


@pytest.mark.parametrize("seed", range(5))
def test_penalties_and_bans_equal_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        size = rng.choice([5, 40])
        logits = torch.randn(size, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * 5
        params = SamplingParams(
            repetition_penalty=rng.choice([1.0, 0.5, 1.3, 100.0]),
            presence_penalty=rng.choice([0.0, -1.5, 2.0, 100.0]),
            frequency_penalty=rng.choice([0.0, -0.5, 1.0, 100.0]),
            min_tokens=rng.choice([0, 4]),
            stop_token_ids=rng.choice([(), (3, 4), (10**6,)]),
            ignore_eos=rng.random() < 0.3,
        )
        prompt = [rng.randrange(size) for _ in range(rng.randint(1, 8))] + [size + 3]
        row = row_of(params, prompt, [rng.randrange(size) for _ in range(rng.randint(0, 8))])
        before = logits.clone()
        wanted = reference_logits(logits.tolist(), row)
        np.testing.assert_allclose(adjusted(logits.numpy(), row), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits, before), "the caller's logits were changed"
        assert tokens_of(sample(logits.unsqueeze(0), [row])) == [int(np.argmax(np.float32(wanted)))]


def test_ties_keep_the_lower_ids() -> None:
    flat = np.zeros(10, dtype=np.float32)
    flat[::2] = -0.0  # equal all the same
    uniforms = np.linspace(0.0, 1.0, 100, endpoint=False)
    assert set(draws(flat, SamplingParams(temperature=1.0, top_k=3), uniforms)) == {0, 1, 2}
    assert set(draws(flat, SamplingParams(temperature=1.0, top_p=0.35), uniforms)) == {0, 1, 2, 3}
    assert tokens_of(sample(torch.zeros(2, 10), [row_of(SamplingParams())] * 2)) == [0, 0]


def test_a_nucleus_of_most_of_a_large_flat_vocabulary() -> None:
    logits = np.zeros(20_000, dtype=np.float32)
    assert draws(logits, SamplingParams(temperature=1.0, top_p=0.75), np.array([0.0, 0.5, 0.99999])) == [
        0,
        7500,
        14_999,
    ]


MIXED = [
    SamplingParams(logprobs=3),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=5, seed=2, logprobs=0),
    SamplingParams(temperature=1.5, top_p=0.9, seed=3),
    SamplingParams(repetition_penalty=1.3, min_tokens=4, logprobs=7),
    SamplingParams(temperature=1.0, min_p=0.05, frequency_penalty=0.5, seed=4),
    SamplingParams(),
]


def test_a_row_does_not_depend_on_the_others() -> None:
    """Tokens and log-probabilities over several steps, bit for bit, together, shuffled and alone."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(len(MIXED), 5000, generator=generator) * 3 for _ in range(4)]

    def run(indices: list[int]) -> dict[int, list[Sampled | EngineFailure]]:
        rows = {index: row_of(MIXED[index], output=[]) for index in indices}
        found: dict[int, list[Sampled | EngineFailure]] = {index: [] for index in indices}
        for logits in steps:
            for index, one in zip(indices, sample(logits[indices], [rows[i] for i in indices]), strict=True):
                assert isinstance(one, Sampled)
                found[index].append(one)
                rows[index].token_ids = [*rows[index].token_ids, one.token_id]
        return found

    together = run(list(range(len(MIXED))))
    assert run([3, 6, 1, 0, 5, 2, 4]) == together
    for index in range(len(MIXED)):
        assert run([index])[index] == together[index]


def test_seeds_fix_the_draws_and_differ() -> None:
    logits = torch.zeros(1, 1000)

    def twenty(seed: int) -> list[int]:
        row = row_of(SamplingParams(temperature=1.0, seed=seed))
        return [tokens_of(sample(logits, [row]))[0] for _ in range(20)]

    assert twenty(5) == twenty(5)
    assert twenty(5) != twenty(6)
    assert len(set(twenty(2**64 - 1))) > 10


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.7, top_k=4),
        SamplingParams(temperature=0.8, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.2),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    num_draws = 4000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -9.0])
    row = row_of(replace(params, seed=11))
    counts = np.bincount([tokens_of(sample(logits.unsqueeze(0), [row]))[0] for _ in range(num_draws)], minlength=8)
    expected = reference_probabilities(logits.tolist(), params) * num_draws
    assert (counts[expected == 0] == 0).all(), "a filtered token was drawn"
    large = expected >= 5
    chi_squared = float((((counts - expected) ** 2)[large] / expected[large]).sum())
    assert chi_squared < 30, "p < 1e-4 for at most 7 degrees of freedom"


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e37])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=5e-324, top_p=0.5),
        SamplingParams(temperature=100.0, top_k=2**31 - 1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, top_p=math.nextafter(1.0, 0.0)),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=1, top_p=1e-300, min_p=1.0),
        SamplingParams(temperature=1.0, repetition_penalty=100.0, presence_penalty=100.0, frequency_penalty=100.0),
        SamplingParams(temperature=1.0, repetition_penalty=0.01, presence_penalty=-100.0, frequency_penalty=-100.0),
        SamplingParams(temperature=1.0, min_tokens=100, stop_token_ids=tuple(range(64))),
        SamplingParams(min_tokens=100, stop_token_ids=tuple(range(64)), repetition_penalty=100.0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extreme_parameters_still_draw_a_token(params: SamplingParams, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (2, 64, 700):
        logits = torch.randn(1, size, generator=generator) * scale
        row = row_of(params, output=[1] * 90)
        token = tokens_of(sample(logits, [row]))[0]
        assert 0 <= token < size
        values = adjusted(logits[0].numpy(), row)
        assert not np.isnan(values).any()
        assert values[token] > -np.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_fail_their_row_alone(bad: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    rows = [row_of(SamplingParams(logprobs=2)), row_of(SamplingParams(temperature=1.0)), row_of(SamplingParams())]
    for broken in range(3):
        poisoned = logits.clone()
        poisoned[broken, 17] = bad
        results = sample(poisoned, rows)
        assert [isinstance(one, EngineFailure) for one in results] == [index == broken for index in range(3)]
    huge = torch.full((1, 50), 3e38)
    assert tokens_of(sample(huge, [row_of(SamplingParams())])) == [0], "finite, though their sum is not"


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), []) == []


# --- log-probabilities ---


@pytest.mark.parametrize("num_top", [0, 1, 5, 40, 1000])
def test_logprobs_equal_the_reference(num_top: int) -> None:
    # Rounded, so that there are many ties, also at the edge of the likeliest.
    logits = (torch.randn(70, 60, generator=torch.Generator().manual_seed(3)) * 2).round()
    tokens = [index % 60 for index in range(70)]
    results = token_logprobs(logits, tokens, num_top)
    exact = logits.double().log_softmax(-1)
    for index, result in enumerate(results):
        assert result.token_id == tokens[index]
        assert result.logprob == pytest.approx(float(exact[index, tokens[index]]), abs=1e-5)
        wanted = sorted(range(60), key=lambda token: (-float(logits[index, token]), token))[:num_top]
        assert [token for token, _ in result.top] == wanted
        assert all(p == pytest.approx(float(exact[index, token]), abs=1e-5) for token, p in result.top)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    params = SamplingParams(temperature=5.0, top_k=1, repetition_penalty=50.0, seed=1, logprobs=2)
    (one,) = sample(logits, [row_of(params, [0], [0])])
    assert isinstance(one, Sampled)
    assert one.logprob is not None
    assert one.logprob.logprob == pytest.approx(float(logits[0].log_softmax(-1)[one.token_id]))
    assert [token for token, _ in one.logprob.top] == [0, 1]


def test_logprobs_of_a_row_are_bitwise_the_same_alone() -> None:
    logits = torch.randn(130, 3000, generator=torch.Generator().manual_seed(4)) * 4
    tokens = list(range(130))
    together = token_logprobs(logits, tokens, 4)
    for index in (0, 63, 64, 129):
        assert token_logprobs(logits[index : index + 1], [tokens[index]], 4) == [together[index]]


def test_scores_refuse_logits_that_are_no_numbers() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 1] = math.nan
    with pytest.raises(EngineFailure, match="not finite"):
        token_logprobs(logits, [0, 0], 1)
    assert token_logprobs(torch.zeros(0, 5), [], 1) == []


@pytest.mark.parametrize("n", [1, 3, 9, 10, 20])
def test_top_n_with_ties(n: int) -> None:
    values: Tensor = torch.tensor([[1.0, 2, 2, 2, 0, 2, 1, 1, 3, 1], [0.0] * 10, list(map(float, range(10)))])
    top, ids = top_n(values, n)
    for row, row_ids, row_top in zip(values.tolist(), ids.tolist(), top.tolist(), strict=True):
        wanted = sorted(range(10), key=lambda i: (-row[i], i))[:n]
        assert row_ids == wanted
        assert row_top == [row[i] for i in wanted]
