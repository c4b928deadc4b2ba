"""What stands beside a benchmark's figures: the committed result of the most similar machine."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def last_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("last_results")
    monkeypatch.setattr(module, "LAST_RESULTS", tmp_path)
    return module


def machine(**facts: Any) -> dict[str, Any]:
    return {"cpu": "a processor", "cores": 2, "isa": ["avx2"], "commit": "0123456789abcdef", **facts}


def commit(folder: Path, name: str, **facts: Any) -> None:
    (folder / name).write_text(json.dumps({"machine": machine(**facts), "options": {"seed": 3}}), encoding="utf-8")


def test_a_machine_of_the_same_kind_comes_first(last_results: Any, tmp_path: Path) -> None:
    commit(tmp_path, "cpu_table_a.json", isa=["amx_int8"])
    commit(tmp_path, "cpu_table_b.json")
    commit(tmp_path, "gpu_decode.json", device="one")
    commit(tmp_path, "gpu_decode_two.json", device="two")
    for benchmark, wanted, kind, key in (
        ("cpu_table", {"isa": ["avx2"]}, last_results.CPU_KIND, "isa"),
        ("cpu_table", {"isa": ["amx_int8"]}, last_results.CPU_KIND, "isa"),
        ("gpu_decode", {"device": "two"}, last_results.GPU_KIND, "device"),
        ("gpu_decode", {"device": "one"}, last_results.GPU_KIND, "device"),
    ):
        assert last_results.last_result(benchmark, machine(**wanted), kind)["machine"][key] == wanted[key]
    assert last_results.last_result("gpu_decode", machine(device="three"), last_results.GPU_KIND) is not None
    assert last_results.last_result("gpu_kernels", machine(), last_results.GPU_KIND) is None


def test_the_same_processor_comes_before_others_of_its_kind(last_results: Any, tmp_path: Path) -> None:
    commit(tmp_path, "cpu_table_a.json", cpu="another processor")
    commit(tmp_path, "cpu_table_b.json")
    for cpu in ("a processor", "another processor"):
        assert last_results.last_result("cpu_table", machine(cpu=cpu))["machine"]["cpu"] == cpu


def test_it_says_where_the_last_result_comes_from(
    last_results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path, "gpu_decode.json", device="one")
    for device, said in (("one", "this kind of machine"), ("two", "another machine (one, 2 cores)")):
        here = machine(device=device)
        last_results.print_origin(last_results.last_result("gpu_decode", here, last_results.GPU_KIND), here)
        assert f"commit 0123456789ab, seed 3, {said}" in capsys.readouterr().out
    last_results.print_origin(None, machine())
    assert "no result of this benchmark is committed yet" in capsys.readouterr().out
