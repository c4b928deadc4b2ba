"""The table of measured products: what it chooses among gives the same bits, and it survives the process and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not tested")

from kernel_cases import DEVICE, normal, random_layer, seeded
from polyhead_core.kernels.triton import tuning
from polyhead_core.kernels.triton.int8_linear import int8_product
from polyhead_core.kernels.triton.quantize import quantize_rows

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu

KEY = tuning.ShapeKey(rows=4, width=96, outputs=40, outliers=8)


def test_rows_fall_into_buckets() -> None:
    assert [tuning.bucket(rows) for rows in (1, 3, 64, 65, 5000)] == [1, 4, 64, 128, 2048]


def test_all_candidates_of_w8a8_give_the_same_bits_and_the_float_ones_nearly_so() -> None:
    candidates = tuning.w8a8_candidates(KEY, DEVICE)
    results = [candidate.call() for candidate in candidates]
    assert len(results) == len(tuning.W8A8_TILES) + 1
    first = results[0]
    assert all(torch.equal(result, first) for result in results)
    assert all(candidate.is_right(first) for candidate in candidates)
    off_by_one_bit = first.clone()
    off_by_one_bit[-1, -1] = first[-1, -1].nextafter(first.new_tensor(torch.inf))
    assert not candidates[0].is_right(off_by_one_bit)
    for candidate in tuning.float_candidates(KEY, DEVICE):
        result = candidate.call()
        assert (result.float() - first).abs().max() < 0.03 * first.abs().max()
        assert candidate.is_right(result)
        assert not candidate.is_right(-result)


def test_random_weights_take_a_byte_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made, draw = [], torch.randint

    def randint(*arguments: Any, **settings: Any) -> torch.Tensor:
        made.append(result := draw(*arguments, **settings))
        return result

    monkeypatch.setattr(torch, "randint", randint)
    tuning._random_operands(KEY, DEVICE)
    assert [weight.dtype for weight in made] == [torch.int8]


RIGHT = torch.ones(2)


def returns(result: torch.Tensor, family: str, name: str) -> tuning.Candidate:
    return tuning.Candidate(
        family=family, name=name, call=lambda: result, is_right=lambda found: torch.equal(found, RIGHT)
    )


def has_no_memory(name: str) -> tuning.Candidate:
    return fails(name, torch.OutOfMemoryError("CUDA out of memory"))


def fails(name: str, error: Exception) -> tuning.Candidate:
    def call() -> torch.Tensor:
        raise error

    return tuning.Candidate(family="w8a8", name=name, call=call, is_right=lambda _found: True)


def test_the_fastest_is_chosen_within_its_family_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "time_alternating", lambda calls: [3.0, None, 2.0, 1.0][: len(calls)])
    names = [("w8a8", "a"), ("w8a8", "too-large"), ("w8a8", "b"), ("dequantized", "c")]
    candidates = [returns(RIGHT, family, name) for family, name in names]
    path = tmp_path / "tuning" / "table.json"
    table = tuning.TuningTable(path)
    assert KEY not in table
    table.measure(KEY, candidates)
    assert table.fastest(KEY, "w8a8") == "b"
    again = tuning.TuningTable(path)
    assert KEY in again
    assert again.seconds(KEY) == {"w8a8": {"a": 3.0, "b": 2.0}, "dequantized": {"c": 1.0}}
    path.write_text("{damaged")
    assert KEY not in tuning.TuningTable(path)


def test_what_is_wrong_or_fails_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "time_alternating", lambda calls: [float(place) for place in range(len(calls))])
    table = tuning.TuningTable(tmp_path / "table.json")
    wrong, right = returns(torch.zeros(2), "w8a8", "wrong"), returns(RIGHT, "w8a8", "right")
    refused = fails("refused", RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"))
    table.measure(KEY, [wrong, has_no_memory("large"), refused, right])
    assert table.seconds(KEY) == {"w8a8": {"right": 0.0}}
    assert "a candidate fails on this device: CUBLAS_STATUS_NOT_SUPPORTED" in caplog.text
    assert "w8a8 wrong is wrong for 4x96x40+8" in caplog.text


@pytest.mark.parametrize("short_of_memory", ["operands", "candidates"])
def test_without_memory_to_measure_a_default_serves(
    short_of_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def candidates(key: tuning.ShapeKey, _device: torch.device) -> list[tuning.Candidate]:
        asked.append(key)
        if short_of_memory == "operands":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [has_no_memory("large")]

    monkeypatch.setattr(tuning, "w8a8_candidates", candidates)
    monkeypatch.setattr(tuning, "time_alternating", lambda calls: [1.0 for _ in calls])
    table = tuning.TuningTable(tmp_path / "table.json")
    monkeypatch.setattr(tuning.TuningTable, "of", lambda _device: table)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer, x = random_layer(seeded(1), 64, 32), normal(seeded(2), 3, 64)
    rows = quantize_rows(x, layer.input_scale, layer.outlier_columns)
    for _ in range(2):
        product = tuning.w8a8_product(rows, layer.weight)
        found = product(rows, layer.weight, layer.SCB, layer.outlier_weight)
        assert torch.equal(found, int8_product(rows, layer.weight, layer.SCB, layer.outlier_weight))
    assert asked == [tuning.ShapeKey(rows=4, width=64, outputs=32, outliers=8)], "it is not tried at every step"


def test_the_key_of_a_table_changes_with_the_device() -> None:
    assert tuning.table_key("one device") != tuning.table_key("another device")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="timing needs a CUDA device")
def test_products_are_measured_on_the_device(tmp_path: Path) -> None:
    table = tuning.TuningTable(tmp_path / "table.json")
    table.measure(KEY, tuning.w8a8_candidates(KEY, DEVICE) + tuning.float_candidates(KEY, DEVICE))
    assert {"w8a8", "w8a16", "dequantized"} <= table.seconds(KEY).keys()
    assert all(seconds > 0 for family in table.seconds(KEY).values() for seconds in family.values())
