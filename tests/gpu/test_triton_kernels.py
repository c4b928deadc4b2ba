"""Triton's kernels against the reference that defines them, on random shapes; rows never depend on their batch.

On a CUDA device by `make test-gpu`; elsewhere in Triton's interpreter with all other tests, where triton is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not tested")

from kernel_cases import (
    DEVICE,
    int8_arguments,
    integer,
    joined_tables,
    normal,
    random_layer,
    random_pages,
    random_slots,
    random_tables,
    seeded,
    spoil_front,
    with_keys_first,
)
from polyhead_core.kernels import reference
from polyhead_core.kernels.decoder import Activation
from polyhead_core.kernels.triton import arithmetic, attention, int8_linear, logits, low_rank, quantize, rotary

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu

FLOATS = [torch.float32, torch.bfloat16]
# Triton's exp and tanh differ from torch's in the last bits, and sums are taken in another order.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def on_cpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The reference's own arithmetic: torch divides differently on CUDA, which moves a rounding now and then."""
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


BFLOAT16_CUT = {torch.bfloat16: {"rtol": 2**-7, "atol": 0.0}}


def assert_same_bits(first: torch.Tensor, second: torch.Tensor) -> None:
    """Bit for bit on a device. The interpreter multiplies floats by numpy, whose sums depend on a row's place, and
    cuts bfloat16 off instead of rounding it."""
    if DEVICE.type == "cuda":
        assert torch.equal(first, second)
    else:
        torch.testing.assert_close(first, second, **({"rtol": 1e-5, "atol": 1e-5} | BFLOAT16_CUT.get(first.dtype, {})))


def test_without_a_device_the_interpreter_runs() -> None:
    assert (DEVICE.type == "cpu") == arithmetic.INTERPRETED


@pytest.mark.parametrize("seed", range(3))
def test_int8_linear_equals_the_reference_bit_for_bit(seed: int) -> None:
    generator = seeded(seed)
    rows, width, out = integer(generator, 1, 20), integer(generator, 1, 300), integer(generator, 1, 100)
    layer = random_layer(generator, width, out)
    x = normal(generator, rows, width) * 10 ** normal(generator, 1, width)
    expected = reference.int8_linear(*on_cpu(x, *int8_arguments(layer)))
    assert torch.equal(int8_linear.int8_linear(x, *int8_arguments(layer)).cpu(), expected)
    quantized = quantize.quantize_rows(x, layer.input_scale, layer.outlier_columns)
    by_cublas = int8_linear.int8_product_cublas(quantized, layer.weight, layer.SCB, layer.outlier_weight, layer.bias)
    assert torch.equal(by_cublas.cpu(), expected)


@pytest.mark.parametrize("seed", range(2))
def test_int8_rows_are_the_same_bits_alone_in_any_batch_and_in_any_tile(seed: int) -> None:
    generator = seeded(seed)
    layer = random_layer(generator, 65 + seed, 33 + seed)
    x = normal(generator, 21, layer.in_features)
    x[5] *= 1000  # a neighbour with outliers
    together = int8_linear.int8_linear(x, *int8_arguments(layer))
    for tile in (int8_linear.default_tile(rows) for rows in (1, 200)):
        assert torch.equal(int8_linear.int8_linear(x, *int8_arguments(layer), tile=tile), together)
    for row in (0, 20):
        assert torch.equal(int8_linear.int8_linear(x[row : row + 1], *int8_arguments(layer))[0], together[row])


def test_rows_of_zeros_and_of_huge_numbers() -> None:
    layer = random_layer(seeded(2), 64, 32)
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30)]).to(DEVICE)
    y = int8_linear.int8_linear(x, *int8_arguments(layer))
    assert torch.equal(y.cpu(), reference.int8_linear(*on_cpu(x, *int8_arguments(layer))))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none_and_stays_in_its_row(outlier: bool, value: float) -> None:
    """Through what quantises rows: plain, after a norm and after a gate; in an outlier column and in another."""
    layer = random_layer(seeded(3), 64, 32)
    columns = set(layer.outlier_columns.tolist())
    column = min(columns if outlier else set(range(64)) - columns)
    x, weight = normal(seeded(4), 5, 64), normal(seeded(5), 64)
    spoiled = x.clone()
    spoiled[2, column] = value

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        ways = [
            quantize.quantize_rows(x, layer.input_scale, layer.outlier_columns),
            quantize.rms_norm_quantize(x, weight, 1e-5, layer.input_scale, layer.outlier_columns),
            *(quantize.gated_quantize(x, x, one, layer.input_scale, layer.outlier_columns) for one in Activation),
        ]
        return [
            product(rows, layer.weight, layer.SCB, layer.outlier_weight, layer.bias)
            for rows in ways
            for product in (int8_linear.int8_product, int8_linear.int8_product_cublas)
        ]

    for found, expected in zip(results(spoiled), results(x), strict=True):
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("split", [False, True])
def test_a_query_that_is_no_number_spoils_its_own_row_alone(
    split: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SEGMENT", 32)
    p = random_pages(2)
    rest = (p["k"], p["v"], p["tables"], p["sequence"], p["positions"], 0.2)
    expected = attention.paged_attention(p["q"], *rest, split=split)
    p["q"][3, 4, 5] = value
    found = attention.paged_attention(p["q"], *rest, split=split)
    assert not found[3, 4].isfinite().any()
    others = torch.ones(found.shape[:2], dtype=torch.bool)
    others[3, 4] = False
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", range(2))
def test_the_weight_only_product_equals_the_reference(seed: int, dtype: torch.dtype) -> None:
    generator = seeded(seed)
    layer = random_layer(generator, integer(generator, 1, 200), integer(generator, 1, 100))
    x = normal(generator, integer(generator, 1, 20), layer.in_features, dtype=dtype)
    arguments = (layer.weight, layer.SCB, layer.input_scale, layer.bias)
    y = int8_linear.int8_linear_weight_only(x, *arguments)
    expected = reference.int8_linear_weight_only(x, *arguments)
    spread = expected.abs().max()
    torch.testing.assert_close(y / spread, expected / spread, **CLOSE[dtype])
    assert_same_bits(int8_linear.int8_linear_weight_only(x[:1], *arguments)[0], y[0])


def assert_quantizes(got: quantize.QuantizedRows, x: torch.Tensor, rest: tuple[torch.Tensor | None, ...]) -> None:
    """`got` are the rows of x (close to `got.x_TI`), and stand for that x / input_scale within half a step."""
    input_scale, columns = rest
    assert got.x_TI is not None
    torch.testing.assert_close(got.x_TI, x, rtol=1e-5, atol=1e-5)
    plain = quantize.quantize_rows(got.x_TI, input_scale, columns)
    assert torch.equal(got.q_TI, plain.q_TI)
    assert torch.equal(got.scale_T, plain.scale_T)
    if columns is not None:
        assert got.high_TK is not None
        assert torch.equal(got.high_TK, plain.high_TK)
        assert torch.equal(got.low_TK, plain.low_TK)
    smoothed = x if input_scale is None else x / input_scale
    stands_for = got.q_TI * got.scale_T[:, None]
    if columns is not None:
        stands_for[:, columns] = got.high_TK * got.high_scale_T[:, None] + got.low_TK * got.low_scale_T[:, None]
    assert ((stands_for - smoothed).abs() <= 0.5 * got.scale_T[:, None] + 1e-4).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [33, 64, 131])
def test_norm_and_gate_fused_with_quantisation(width: int, dtype: torch.dtype) -> None:
    generator = seeded(width)
    layer = random_layer(generator, width, 3)
    rest = (layer.input_scale, layer.outlier_columns)
    x, weight = normal(generator, 5, width, dtype=dtype) * 3, normal(generator, width, dtype=dtype)
    normed = quantize.rms_norm_quantize(x, weight, 1e-5, *rest, keep_x=True)
    assert_quantizes(normed, reference.rms_norm(x, weight, 1e-5), rest)
    gate, up = normal(generator, 5, 2 * width, dtype=dtype).chunk(2, dim=1)
    for activation in Activation:
        gated = quantize.gated_quantize(gate, up, activation, *rest, keep_x=True)
        assert_quantizes(gated, reference.gated(gate, up, activation), rest)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [33, 576])
def test_a_row_is_normed_by_itself(width: int, dtype: torch.dtype) -> None:
    generator = seeded(width)
    x, weight = normal(generator, 19, width, dtype=dtype) * 3, normal(generator, width, dtype=dtype)
    normed = quantize.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(normed, reference.rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(quantize.rms_norm(x[row : row + 1], weight, 1e-5)[0], normed[row]) for row in range(19))
    assert quantize.rms_norm(x[:0], weight, 1e-5).shape == (0, width)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", range(2))
def test_low_rank_products_equal_the_reference(seed: int, dtype: torch.dtype) -> None:
    generator = seeded(seed)
    width, out = integer(generator, 1, 700), integer(generator, 1, 150)
    tables = random_tables(seed, width, out, dtype)
    x, y = normal(generator, 6, width), normal(generator, 6, out)
    slots = random_slots(generator, 6)
    if seed % 2:
        slots = slots.sort().values
    expected = y.clone()
    reference.low_rank_add(expected, x, tables, 1, slots)
    by_row, by_segment = y.clone(), y.clone()
    low_rank.low_rank_add(by_row, x, tables, 1, slots, by_segment=False)
    low_rank.low_rank_add(by_segment, x, tables, 1, slots, by_segment=True)
    torch.testing.assert_close(by_row, expected, rtol=1e-4, atol=1e-4)
    assert_same_bits(by_row, by_segment)
    assert torch.equal(by_row[slots == -1], y[slots == -1])
    for row in (0, 5):
        one, alone = slice(row, row + 1), y[row : row + 1].clone()
        low_rank.low_rank_add(alone, x[one], tables, 1, slots[one])
        assert_same_bits(alone[0], by_row[row])


@pytest.mark.parametrize("by_segment", [False, True])
def test_parts_of_one_launch_are_the_products_of_their_sites(by_segment: bool) -> None:
    generator = seeded(5)
    widths = (150, 40, 130)
    tables = [random_tables(seed, 70, width, torch.float32) for seed, width in enumerate(widths)]
    joined = joined_tables(tables)
    x, y, slots = normal(generator, 5, 70), normal(generator, 5, sum(widths)), random_slots(generator, 5)
    expected, begin, parts = y.clone(), 0, []
    for index, width in enumerate(widths):
        columns = expected[:, begin : begin + width].clone()
        reference.low_rank_add(columns, x, tables[index], 1, slots)
        expected[:, begin : begin + width] = columns
        parts.append(low_rank.SitePart(site=2 * index + 1, begin=begin, width=width))
        begin += width
    whole = y.clone()
    low_rank.low_rank_add_parts(whole, x, joined, parts, slots, by_segment)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    some = y.clone()
    low_rank.low_rank_add_parts(some, x, joined, [parts[0], parts[2]], slots, by_segment)
    assert_same_bits(some[:, :150], whole[:, :150])
    assert torch.equal(some[:, 150:190], y[:, 150:190])
    assert_same_bits(some[:, 190:], whole[:, 190:])


def test_rows_stand_along_the_axis_of_a_grid_that_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others end at 65,535; a training step has more rows."""
    grids: list[tuple[int, ...]] = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_arguments, **_settings: None

    rows = quantize.QuantizedRows(
        q_TI=torch.ones(70_000, 16, dtype=torch.int8, device=DEVICE), scale_T=torch.ones(70_000, device=DEVICE)
    )
    monkeypatch.setattr(int8_linear, "_epilogue_kernel", Launches())
    int8_linear.int8_product_cublas(rows, torch.ones(32, 16, dtype=torch.int8, device=DEVICE), rows.scale_T[:32])
    assert grids == [(70_000, 1)]


def test_products_are_added_to_what_is_there() -> None:
    generator = seeded(8)
    layer, x = random_layer(generator, 70, 33), normal(generator, 4, 70)
    residual = normal(generator, 4, 33)
    quantized = quantize.quantize_rows(x, layer.input_scale, layer.outlier_columns)
    arguments = (quantized, layer.weight, layer.SCB, layer.outlier_weight, layer.bias)
    expected = residual + int8_linear.int8_product(*arguments)
    for product in (int8_linear.int8_product, int8_linear.int8_product_cublas):
        got = residual.clone()
        assert product(*arguments, got) is got
        assert torch.equal(got, expected)


def test_low_rank_products_of_bfloat16_rows_and_a_site_without_pages() -> None:
    generator = seeded(11)
    tables = random_tables(11, 40, 24, torch.bfloat16)
    x, y = normal(generator, 9, 40, dtype=torch.bfloat16), normal(generator, 9, 24, dtype=torch.bfloat16)
    slots = random_slots(generator, 9)
    expected, got, untouched = y.float(), y.clone(), y.clone()
    reference.low_rank_add(expected, x, tables, 1, slots)
    low_rank.low_rank_add(got, x, tables, 1, slots)
    torch.testing.assert_close(got.float(), expected, **CLOSE[torch.bfloat16])
    low_rank.low_rank_add(untouched, x, tables, 0, slots)
    assert torch.equal(untouched, y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding_rows_equal_the_reference(dtype: torch.dtype) -> None:
    generator = seeded(7)
    vocab, out = 50, 133
    tables = random_tables(7, vocab, out, dtype)  # an embedding's A page has vocab * 8 elements, as a linear one's
    tokens = torch.randint(0, vocab, (19,), generator=generator).to(DEVICE)
    slots, y = random_slots(generator, 19), normal(generator, 19, out)
    expected = y.clone()
    reference.embedding_add(expected, tokens, tables, 1, slots, vocab)
    low_rank.embedding_add(y, tokens, tables, 1, slots)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


# The interpreter takes seconds for each: there, one case of each kind.
@pytest.mark.parametrize("seed", range(6) if DEVICE.type == "cuda" else [2])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (40, 0.0), (0, 3.0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_paged_attention_equals_the_reference(
    seed: int, window: int, softcap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SEGMENT", 32)
    p = random_pages(seed)
    q, pages = p["q"], (p["k"].to(dtype), p["v"].to(dtype), p["tables"])
    where, rest = (p["sequence"], p["positions"]), (0.2, window, softcap)
    slow = reference.paged_attention(q, *pages, *where, *rest)
    fast = attention.paged_attention(q, *pages, *where, *rest)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for split, step in ((False, 4), (True, 1)):
        if step * (q.shape[1] // pages[0].shape[1]) <= 16:
            again = attention.paged_attention(q, *pages, *where, *rest, split=split, step=step)
            assert_same_bits(again, fast)
    for row in (0, len(q) - 1):
        one = slice(row, row + 1)
        alone = attention.paged_attention(q[one], *pages, where[0][one], where[1][one], *rest)
        assert_same_bits(alone[0], fast[row])
    if window:
        return
    narrow = attention.paged_attention(q.bfloat16(), *pages, *where, *rest)
    torch.testing.assert_close(narrow.float(), slow, **CLOSE[torch.bfloat16])


@pytest.mark.parametrize(("window", "split"), [(0, False), (0, True), (5, True)])
def test_keys_that_begin_within_a_block_are_attended_to_as_if_moved_to_its_beginning(
    window: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SEGMENT", 32)
    p = random_pages(2)
    offsets = torch.tensor([3, 0, 40], dtype=torch.int32, device=DEVICE)
    room = p["tables"].shape[1] * p["k"].shape[2] - offsets[p["sequence"].long()]
    rest = (p["sequence"], p["positions"].minimum(room - 1), 0.2, window, 0.0)
    moved = with_keys_first(p["k"], p["v"], p["tables"], offsets)
    expected = reference.paged_attention(p["q"], *moved, p["tables"], *rest)
    spoil_front(p["k"], p["v"], p["tables"], offsets)
    found = attention.paged_attention(p["q"], p["k"], p["v"], p["tables"], *rest, offsets, split=split)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("width", "rotary_width"), [(16, 16), (20, 20), (64, 32)])
def test_rotary_and_the_store_of_keys_and_values(width: int, rotary_width: int, dtype: torch.dtype) -> None:
    generator = seeded(width)
    tokens, heads, groups, block, blocks = 7, 6, 2, 4, 5
    q, k, v = (normal(generator, n, tokens, width).transpose(0, 1) for n in (heads, groups, groups))
    angle = normal(generator, tokens, rotary_width // 2).repeat(1, 2)
    slots = torch.randperm(blocks * block, generator=generator)[:tokens].to(DEVICE)
    pages = [torch.zeros(blocks, groups, block, width, device=DEVICE, dtype=dtype) for _ in range(6)]
    rotated = rotary.rotary_write_kv(q, k, v, angle.cos(), angle.sin(), pages[0], pages[1], slots)
    torch.testing.assert_close(rotated, reference.rotate(q, angle.cos(), angle.sin()))
    reference.write_kv(reference.rotate(k, angle.cos(), angle.sin()), v, pages[2], pages[3], slots)
    torch.testing.assert_close(pages[0], pages[2], **({} if dtype == torch.float32 else CLOSE[dtype]))
    assert_same_bits(pages[1], pages[3])
    norms = rotary.HeadNorms(q=normal(generator, width), k=normal(generator, width), eps=1e-5)
    narrow = rotary.rotary_write_kv(q, k, v, angle.cos(), angle.sin(), pages[0], pages[1], slots, norms, torch.bfloat16)
    normed = reference.rms_norm(q, norms.q, norms.eps)
    expected = reference.rotate(normed, angle.cos(), angle.sin())
    torch.testing.assert_close(narrow.float(), expected, **CLOSE[torch.bfloat16])
    reference.write_kv(
        reference.rotate(reference.rms_norm(k, norms.k, norms.eps), angle.cos(), angle.sin()), v, *pages[2:4], slots
    )
    torch.testing.assert_close(pages[0], pages[2], **CLOSE[dtype])
    rotary.write_kv(k, v, pages[4], pages[5], slots)
    assert_same_bits(pages[5], pages[3])
    reference.write_kv(k, v, pages[2], pages[3], slots)
    assert_same_bits(pages[4], pages[2])


@pytest.mark.parametrize("vocab", [1, 30, 4096, 9001])
def test_greedy_equals_the_reference(vocab: int) -> None:
    x = (normal(seeded(vocab), 6, vocab) * 3).round()  # with ties
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, -3e38)):
        x[row, vocab // 2] = value
    got = logits.greedy(x)
    assert torch.equal(got, reference.greedy(x))
    assert (got == -1).tolist() == [True] * 3 + [False] * 3
    assert logits.greedy(x[:0]).shape == (0,)
