"""What benchmarks print can go into a document as it is: no path of the machine, no warning of a library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_backbone

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

_WRITE_ADAPTERS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from machine import silence_peft
from serving_workload import write_adapters
silence_peft()
write_adapters(Path(sys.argv[3]), Path(sys.argv[2]), 2, seed=0)
"""


def test_paths_are_relative_or_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from machine import shown  # type: ignore[import-not-found]

    monkeypatch.chdir(tmp_path)
    assert shown(Path("results/serving.json")) == "results/serving.json"
    assert shown(tmp_path / "results" / "serving.json") == "results/serving.json"
    assert shown(tmp_path.parent / "serving.json") == "serving.json"


def test_making_adapters_prints_no_warning(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    command = [sys.executable, "-c", _WRITE_ADAPTERS, str(BENCHMARKS), str(backbone), str(tmp_path / "adapters")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr + done.stdout
    assert len(list((tmp_path / "adapters").iterdir())) == 2


def test_a_machine_that_installs_nothing_has_facts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the sources are in PYTHONPATH, and git may be missing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import machine  # type: ignore[import-not-found]

    monkeypatch.setattr(machine, "PACKAGES", ("torch", "not-installed"))
    monkeypatch.setenv("PATH", "")
    facts = machine.machine_facts()
    assert facts["versions"]["torch"]
    assert (facts["versions"]["not-installed"], facts["commit"], facts["uncommitted_changes"]) == ("", "", False)
