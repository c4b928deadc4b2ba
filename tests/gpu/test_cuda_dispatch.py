"""How dispatch comes to Triton's kernels: lazily, with the reference and one warning where triton is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from kernel_cases import (
    DEVICE,
    int8_arguments,
    normal,
    random_layer,
    random_pages,
    random_slots,
    random_tables,
    seeded,
)
from polyhead_core.kernels import cuda, dispatch, reference

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu


class Recorded:
    """A module that remembers which of its functions were asked for."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._module, name)


def test_importing_the_kernels_imports_no_triton_kernel() -> None:
    code = "import sys, json; from polyhead_core.kernels import cuda, dispatch; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not [name for name in json.loads(done.stdout) if name.startswith("polyhead_core.kernels.triton")]


def test_without_triton_one_warning_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda _name: None)
    cuda.load.cache_clear()
    try:
        assert cuda.load() is None
        assert cuda.load() is None
    finally:
        cuda.load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install triton" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
def test_every_function_of_dispatch_reaches_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead_core.kernels.triton import entry, int8_linear

    kernels = Recorded(entry)
    monkeypatch.setattr(dispatch, "_cpu", lambda _tensor: None)
    monkeypatch.setattr(dispatch, "_triton", lambda _tensor: kernels)
    monkeypatch.setattr(entry.tuning, "w8a8_product", lambda _rows, _weight: int8_linear.int8_product)
    generator = seeded(3)
    layer, x = random_layer(generator, 64, 33), normal(generator, 3, 64)
    arguments = [None if tensor is None else tensor.cpu() for tensor in int8_arguments(layer)]
    expected = reference.int8_linear(x.cpu(), *arguments)
    assert torch.equal(dispatch.int8_linear(x, *int8_arguments(layer)).cpu(), expected)

    tables, slots = random_tables(3, 64, 33, torch.float32), random_slots(generator, 3)
    y = normal(generator, 3, 33)
    added, tokens = y.clone(), torch.tensor([0, 5, 63], device=DEVICE)
    reference.low_rank_add(added, x, tables, 1, slots)
    torch.testing.assert_close(dispatch.low_rank_add(y.clone(), x, tables, 1, slots), added, rtol=1e-4, atol=1e-4)
    embedded = y.clone()
    reference.embedding_add(embedded, tokens, tables, 1, slots, 64)
    torch.testing.assert_close(dispatch.embedding_add(y.clone(), tokens, tables, 1, slots, 64), embedded)

    p = random_pages(0, tokens=3)
    where = (p["tables"], p["sequence"], p["positions"], 0.2)
    attended = reference.paged_attention(p["q"], p["k"], p["v"], *where)
    got = dispatch.paged_attention(p["q"], p["k"], p["v"], *where)
    torch.testing.assert_close(got, attended, rtol=1e-4, atol=1e-4)

    pages = [torch.zeros_like(p["k"]) for _ in range(4)]
    k = normal(generator, 3, p["k"].shape[1], p["k"].shape[3])
    targets = torch.tensor([4, 0, 9], device=DEVICE)
    dispatch.write_kv(k, k + 1, pages[0], pages[1], targets)
    reference.write_kv(k, k + 1, pages[2], pages[3], targets)
    assert torch.equal(pages[0], pages[2])
    assert torch.equal(pages[1], pages[3])
    assert torch.equal(dispatch.greedy(y), reference.greedy(y))
    assert kernels.used == {"int8_linear", "low_rank_add", "embedding_add", "paged_attention", "write_kv", "greedy"}
