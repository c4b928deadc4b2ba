"""The C++ kernels against the reference that defines them, on random shapes; rows never depend on their batch."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

import kernel_cases
from kernel_cases import int8_arguments, needs_compiler
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels import dispatch, reference
from polyhead_core.kernels.cpu import build
from polyhead_core.kernels.draw import Draw

pytestmark = needs_compiler

CPU = torch.device("cpu")
random_layer = partial(kernel_cases.random_layer, device=CPU)
random_tables = partial(kernel_cases.random_tables, device=CPU)


def test_the_kernels_build() -> None:
    assert build.load() is not None


@pytest.mark.parametrize("seed", range(12))
def test_int8_linear_equals_the_reference_bit_for_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width, out = (int(torch.randint(1, limit, (1,), generator=generator)) for limit in (70, 300, 300))
    layer = random_layer(generator, width, out)
    x = torch.randn(rows, width, generator=generator) * 10 ** torch.randn(1, width, generator=generator)
    assert torch.equal(layer(x), reference.int8_linear(x, *int8_arguments(layer)))


@pytest.mark.parametrize("seed", range(6))
def test_int8_rows_are_the_same_bits_alone_and_in_any_batch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(generator, 65 + seed, 33 + seed)
    x = torch.randn(37, layer.in_features, generator=generator)
    x[5] *= 1000  # a neighbour with outliers
    together = layer(x)
    for row in range(len(x)):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("outliers", [1, 3, 16, 37, 70])
def test_outlier_columns_in_any_number_and_order(outliers: int) -> None:
    generator = torch.Generator().manual_seed(outliers)
    columns = torch.randperm(70, generator=generator)[:outliers]
    layer = Int8Linear.from_weight(torch.randn(41, 70, generator=generator), None, None, columns)
    x = torch.randn(11, 70, generator=generator)
    assert torch.equal(layer(x), reference.int8_linear(x, *int8_arguments(layer)))
    packed = layer.packed()
    assert packed is not None
    assert torch.equal(packed.weight(), layer.weight)


@pytest.mark.parametrize(("columns", "words"), [([3, 9, 3], "named twice"), ([70], "outlier column 70 of 70 inputs")])
def test_outlier_columns_that_cannot_be_are_refused(columns: list[int], words: str) -> None:
    weight = torch.zeros(8, 70, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=words):
        dispatch.pack_linear(weight, torch.ones(8), None, torch.tensor(columns))


def test_int8_linear_stays_within_the_quantisation_bound() -> None:
    """|y - (x / s) W'^T| per output is at most half a step of x times the sum of |W'| (weights taken as quantised)."""
    generator = torch.Generator().manual_seed(1)
    for width, out in ((64, 48), (257, 31), (576, 192)):
        layer = random_layer(generator, width, out)
        x = torch.randn(9, width, generator=generator)
        smoothed = x if layer.input_scale is None else x / layer.input_scale
        weight = layer.weight.double() * (layer.SCB.double() / 127)[:, None]
        exact = smoothed.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
        step = smoothed.abs().amax(1, keepdim=True).double() / 127
        bound = step / 2 * weight.abs().sum(1) * 1.001 + 1e-4
        assert ((layer(x).double() - exact).abs() <= bound).all()


def test_rows_of_zeros_and_of_huge_numbers() -> None:
    layer = random_layer(torch.Generator().manual_seed(2), 64, 32)
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30)])
    assert torch.equal(layer(x), reference.int8_linear(x, *int8_arguments(layer)))
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("column", [0, 5, 40, 63])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_stays_in_its_row(column: int, value: float) -> None:
    layer = random_layer(torch.Generator().manual_seed(3), 64, 32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    expected = layer(x)
    x[2, column] = value
    found = layer(x)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_backward_equals_the_reference_and_rows_alone(seed: int, dtype: torch.dtype) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, out, width = draw.randrange(1, 300), draw.choice((1, 33, 96, 192, 1600, 3100)), draw.choice((1, 17, 64, 200))
    weight = torch.randint(-127, 128, (out, width), dtype=torch.int8, generator=generator)
    absmax, scale = torch.rand(out, generator=generator) * 9, torch.rand(width, generator=generator) + 0.5
    g = (torch.randn(rows, out, generator=generator) * 10.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)).to(
        dtype
    )
    for input_scale in (None, scale):
        found = dispatch.int8_linear_backward(g, weight, absmax, input_scale)
        assert found.dtype == dtype
        expected = reference.int8_linear_backward(g.double(), weight, absmax, input_scale)
        # However much the terms of a sum cancel out, its rounding goes by their sizes.
        terms = reference.int8_linear_backward(g.double().abs(), weight.abs(), absmax, input_scale)
        allowed = (2e-6 if dtype == torch.float32 else 2e-2) * terms
        assert ((found - expected).abs() <= allowed).all()
        for row in {0, rows // 2, rows - 1}:
            alone = dispatch.int8_linear_backward(g[row : row + 1], weight, absmax, input_scale)[0]
            if dispatch._cpu(g).runs_backward():
                assert torch.equal(alone, found[row])
            else:  # BLAS sums in an order that depends on the number of rows
                assert ((alone - found[row]).abs() <= 2 * allowed[row]).all()


def test_what_needs_no_padding_for_cublas_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[tuple[int, ...]] = []

    def pad(x: torch.Tensor, missing: tuple[int, ...]) -> torch.Tensor:
        padded.append(missing)
        return torch.nn.functional.pad(x, missing)

    monkeypatch.setattr(reference, "pad", pad)
    for rows, out, width in ((64, 40, 96), (3, 40, 96), (64, 33, 95)):
        q, weight = (torch.ones(size, width, dtype=torch.int8, device="meta") for size in (rows, out))
        assert reference.int8_product(q, weight).shape == (rows, out)
    assert padded == [(0, 0, 0, 29), (0, 1, 0, 0), (0, 1, 0, 7)]


def test_a_lasting_layer_uses_a_results_memory_again_once_nobody_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8)
    packed = dispatch.pack_linear(weight, torch.rand(48, generator=generator), lasting=True)
    assert packed is not None
    x, other = torch.randn(2, 3, 64, generator=generator)
    first = packed.forward(x)
    expected, row = first.clone(), first[1]
    second = packed.forward(other)
    assert torch.equal(first, expected)
    assert not torch.equal(second, first)
    del first
    third = packed.forward(other)
    assert torch.equal(row, expected[1])
    address = third.data_ptr()
    del second, third
    with torch.inference_mode():
        fourth = packed.forward(x[:2])
    assert fourth.data_ptr() == address
    assert torch.equal(fourth, expected[:2])
    fourth += 1  # a tensor of inference mode would not allow it


def test_int8_backward_of_no_rows() -> None:
    weight = torch.ones(6, 5, dtype=torch.int8)
    assert dispatch.int8_linear_backward(torch.zeros(0, 6), weight, torch.ones(6)).shape == (0, 5)


def random_pages(seed: int, blocks: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads, groups, width, block = [(4, 2, 16, 8), (9, 3, 64, 16), (3, 1, 20, 4)][seed % 3]
    tables = torch.randperm(blocks, generator=generator).to(torch.int32).view(3, blocks // 3)
    lengths = torch.randint(1, tables.shape[1] * block, (3,), generator=generator)
    sequence = torch.randint(0, 3, (17,), generator=generator).to(torch.int32)
    positions = (torch.rand(17, generator=generator) * lengths[sequence.long()]).long()
    return {
        "q": torch.randn(17, heads, width, generator=generator),
        "k": torch.randn(blocks, groups, block, width, generator=generator),
        "v": torch.randn(blocks, groups, block, width, generator=generator),
        "tables": tables,
        "sequence": sequence,
        "positions": positions,
    }


def key_pages(pages: dict[str, torch.Tensor], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """`transposed` within their blocks, as the CPU's pool keeps them."""
    keys = pages["k"].to(dtype)
    return keys.transpose(2, 3).contiguous().transpose(2, 3) if transposed else keys


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_paged_attention_equals_the_reference(
    seed: int, window: int, softcap: float, dtype: torch.dtype, transposed: bool
) -> None:
    p = random_pages(seed)
    rest = (key_pages(p, dtype, transposed), p["v"].to(dtype), p["tables"])
    fast = dispatch.paged_attention(p["q"], *rest, p["sequence"], p["positions"], 0.2, window, softcap)
    slow = reference.paged_attention(p["q"], *rest, p["sequence"], p["positions"], 0.2, window, softcap)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for row in range(len(p["q"])):
        one = slice(row, row + 1)
        alone = dispatch.paged_attention(
            p["q"][one], *rest, p["sequence"][one], p["positions"][one], 0.2, window, softcap
        )
        assert torch.equal(alone[0], fast[row])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_begin_within_a_block_are_attended_to_as_if_moved_to_its_beginning(
    seed: int, window: int, dtype: torch.dtype
) -> None:
    p = random_pages(seed)
    keys, values = key_pages(p, dtype, transposed=True), p["v"].to(dtype)
    offsets = torch.tensor([seed, 0, seed + 4], dtype=torch.int32)
    room = p["tables"].shape[1] * keys.shape[2] - offsets[p["sequence"].long()]
    positions = p["positions"].minimum(room - 1)
    moved = kernel_cases.with_keys_first(keys, values, p["tables"], offsets)
    rest = (p["sequence"], positions, 0.2, window, 0.0)
    expected = reference.paged_attention(p["q"], *moved, p["tables"], *rest)
    torch.testing.assert_close(
        reference.paged_attention(p["q"], keys, values, p["tables"], *rest, offsets), expected, rtol=1e-5, atol=1e-5
    )
    kernel_cases.spoil_front(keys, values, p["tables"], offsets)
    found = dispatch.paged_attention(p["q"], keys, values, p["tables"], *rest, offsets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for row in range(len(p["q"])):
        one, alone = slice(row, row + 1), p["sequence"][row : row + 1]
        got = dispatch.paged_attention(
            p["q"][one], keys, values, p["tables"][alone.long()], torch.zeros_like(alone), positions[one], 0.2, window,
            0.0, offsets[alone.long()],
        )  # fmt: skip
        assert torch.equal(got[0], found[row])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 21])
def test_a_prompt_attends_as_its_tokens_do_alone_and_as_the_reference(
    seed: int, dtype: torch.dtype, window: int
) -> None:
    """Consecutive tokens of one sequence share tiles of queries, from wherever a chunk of them begins."""
    generator = torch.Generator().manual_seed(seed)
    heads, groups, width, block = [(9, 3, 64, 16), (4, 4, 32, 16), (6, 1, 96, 32), (5, 5, 20, 8)][seed]
    tokens, before = 45, int(torch.randint(0, 40, (1,), generator=generator))
    blocks = -(-(before + tokens) // block)
    keys = torch.randn(blocks, groups, width, block, generator=generator).to(dtype).transpose(2, 3)
    values = torch.randn(blocks, groups, block, width, generator=generator).to(dtype)
    used = before + tokens - (blocks - 1) * block
    values[-1, :, used:] = torch.nan  # beyond the last token a block may hold anything
    tables = torch.randperm(blocks - 1, generator=generator).to(torch.int32)
    tables = torch.cat((tables, torch.tensor([blocks - 1], dtype=torch.int32)))[None]
    q = torch.randn(tokens, heads, width, generator=generator)
    positions = torch.arange(before, before + tokens)
    sequence = torch.zeros(tokens, dtype=torch.int32)
    together = dispatch.paged_attention(q, keys, values, tables, sequence, positions, 0.2, window)
    expected = reference.paged_attention(q, keys, values, tables, sequence, positions, 0.2, window)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    first = 1 + int(torch.randint(0, tokens - 1, (1,), generator=generator))
    for part in (slice(0, first), slice(first, tokens), slice(7, 8)):
        alone = dispatch.paged_attention(q[part], keys, values, tables, sequence[part], positions[part], 0.2, window)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_query_that_is_no_number_spoils_its_own_row_alone(transposed: bool) -> None:
    p = random_pages(1)
    keys = key_pages(p, torch.bfloat16, transposed)
    rest = (keys, p["v"].bfloat16(), p["tables"], p["sequence"], p["positions"], 0.2)
    expected = dispatch.paged_attention(p["q"], *rest)
    p["q"][3, 4, 5] = torch.nan
    found = dispatch.paged_attention(p["q"], *rest)
    assert found[3, 4].isnan().all()
    others = torch.ones(found.shape[:2], dtype=torch.bool)
    others[3, 4] = False
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_products_equal_the_reference(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, out = (int(torch.randint(1, 200, (1,), generator=generator)) for _ in range(2))
    tables = random_tables(seed, width, out, dtype)
    x, y = torch.randn(23, width, generator=generator), torch.randn(23, out, generator=generator)
    slots = torch.randint(-1, 4, (23,), generator=generator).to(torch.int32)
    expected = y.clone()
    reference.low_rank_add(expected, x, tables, 1, slots)
    got = dispatch.low_rank_add(y.clone(), x, tables, 1, slots)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[slots == -1], y[slots == -1])
    for row in range(len(x)):
        one = slice(row, row + 1)
        assert torch.equal(dispatch.low_rank_add(y[one].clone(), x[one], tables, 1, slots[one])[0], got[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_products_that_threads_share_by_rows_and_columns(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    width, out, rows = 19, 17001, 75
    tables = random_tables(3, width, out, dtype)
    x, y = torch.randn(rows, width, generator=generator), torch.randn(rows, out, generator=generator)
    slots = torch.full((rows,), 3, dtype=torch.int32)
    expected = y.clone()
    reference.low_rank_add(expected, x, tables, 1, slots)
    got = dispatch.low_rank_add(y.clone(), x, tables, 1, slots)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for row in (0, 31, 32, 74):
        one = slice(row, row + 1)
        assert torch.equal(dispatch.low_rank_add(y[one].clone(), x[one], tables, 1, slots[one])[0], got[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows_equal_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    vocab, out = 50, 33
    tables = random_tables(7, vocab, out, dtype)  # an embedding's A page has vocab * 8 elements, as a linear one's
    tokens = torch.randint(0, vocab, (19,), generator=generator)
    slots = torch.randint(-1, 4, (19,), generator=generator).to(torch.int32)
    y = torch.randn(19, out, generator=generator)
    expected = y.clone()
    reference.embedding_add(expected, tokens, tables, 1, slots, vocab)
    torch.testing.assert_close(dispatch.embedding_add(y.clone(), tokens, tables, 1, slots, vocab), expected)


def test_norms_equal_the_reference() -> None:
    for rows, width in ((0, 8), (1, 1), (3, 65), (7, 576)):
        generator = torch.Generator().manual_seed(width)
        x, weight = torch.randn(rows, width, generator=generator) * 5, torch.randn(width, generator=generator)
        got = dispatch.rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(got, reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(dispatch.rms_norm(x[row : row + 1], weight, 1e-5)[0], got[row]) for row in range(rows))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_the_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, vocab = (
        int(torch.randint(1, 40, (1,), generator=generator)),
        int(torch.randint(1, 5000, (1,), generator=generator)),
    )
    logits = (torch.randn(rows, vocab, generator=generator) * 3).round()  # with ties
    logits[rows // 2, vocab // 2] = (float("nan"), float("inf"), float("-inf"), 3e38)[seed]
    got = dispatch.greedy(logits)
    assert torch.equal(got, reference.greedy(logits))
    assert (got[rows // 2] == -1) == (seed < 3)


@pytest.mark.parametrize("seed", range(8))
def test_draws_equal_the_reference(seed: int) -> None:
    """At the ends of a token's share rounding decides between it and its neighbour."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = (1, 2, 17, 511, 513, 5000, 20_000, 50_000)[seed]
    rows, draws = [], []
    for _ in range(40):
        logits = torch.randn(vocab, generator=generator) * rng.choice([0.1, 1, 5, 30])
        logits[torch.rand(vocab, generator=generator) < rng.choice([0.0, 0.5])] = -torch.inf
        logits[vocab // 2] = 1.0
        rows.append(logits.round() if rng.random() < 0.5 else logits)  # with ties
        draws.append(
            Draw(
                temperature=rng.choice([1e-30, 0.2, 0.7, 1.0, 3.0, 100.0]),
                top_k=rng.choice([0, 0, 1, 3, 50, vocab - 1, vocab, 10**6]),
                top_p=rng.choice([1.0, 1.0, 1e-300, 0.3, 0.9, 0.999]),
                min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
                uniform=rng.random(),
            )
        )
    got = dispatch.draw(rows, draws)
    least, most = (
        reference.draw(rows, [how._replace(uniform=min(max(0.0, how.uniform + nudge), 1.0)) for how in draws])
        for nudge in (-1e-6, 1e-6)
    )
    assert all(a <= token <= b for a, token, b in zip(least, got, most, strict=True))
    assert sum(a == b for a, b in zip(least, most, strict=True)) > 30, "a loose test"
