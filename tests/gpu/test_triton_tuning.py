"""The table of measured products: what it chooses among gives the same bits, and it survives the process and damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not tested")

from kernel_cases import DEVICE
from polyhead_core.kernels.triton import tuning

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu

KEY = tuning.ShapeKey(rows=4, width=96, outputs=40, outliers=8)


def test_rows_fall_into_buckets() -> None:
    assert [tuning.bucket(rows) for rows in (1, 3, 64, 65, 5000)] == [1, 4, 64, 128, 2048]


def test_all_candidates_of_w8a8_give_the_same_bits_and_the_float_ones_nearly_so() -> None:
    results = [candidate.call() for candidate in tuning.w8a8_candidates(KEY, DEVICE)]
    assert len(results) == len(tuning.W8A8_TILES) + 1
    first = results[0]
    assert isinstance(first, torch.Tensor)
    assert all(isinstance(result, torch.Tensor) and torch.equal(result, first) for result in results)
    for candidate in tuning.float_candidates(KEY, DEVICE):
        result = candidate.call()
        assert isinstance(result, torch.Tensor)
        assert (result.float() - first).abs().max() < 0.03 * first.abs().max()


def test_the_fastest_is_chosen_within_its_family_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "time_alternating", lambda calls: [3.0, None, 2.0, 1.0][: len(calls)])
    names = [("w8a8", "a"), ("w8a8", "too-large"), ("w8a8", "b"), ("dequantized", "c")]
    candidates = [tuning.Candidate(family=family, name=name, call=lambda: None) for family, name in names]
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


def test_the_key_of_a_table_changes_with_the_device() -> None:
    assert tuning.table_key("one device") != tuning.table_key("another device")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="timing needs a CUDA device")
def test_products_are_measured_on_the_device(tmp_path: Path) -> None:
    table = tuning.TuningTable(tmp_path / "table.json")
    table.measure(KEY, tuning.w8a8_candidates(KEY, DEVICE) + tuning.float_candidates(KEY, DEVICE))
    assert {"w8a8", "w8a16", "dequantized"} <= table.seconds(KEY).keys()
    assert all(seconds > 0 for family in table.seconds(KEY).values() for seconds in family.values())
