"""Energy counters: read from a tree of files like the kernel's, over their wrap, and given up when they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from polyhead_trainer.energy import EnergyMeter, readable_counters

NO_ARGUMENT: Any = None


def zone(powercap: Path, folder: str, name: str, joules: float, wraps_at: float = 1000.0) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{int(wraps_at * 1e6)}\n")
    spend(path, joules)
    return path


def spend(path: Path, joules: float) -> None:
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")


def meter(powercap: Path) -> EnergyMeter:
    return EnergyMeter(readable_counters(torch.device("cpu"), powercap))


def test_packages_alone_are_counted_and_across_their_wrap(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "dtpm", "dtpm", 1)
    energy = meter(tmp_path)
    energy.start()
    for joules in (950, 20, 30):
        spend(first, joules)
        energy.after_step(NO_ARGUMENT, NO_ARGUMENT)
    spend(second, 7)
    energy.after_step(NO_ARGUMENT, NO_ARGUMENT)
    assert energy.joules == {"CPU package-0": 130.0, "CPU package-1": 2.0}


def test_a_continued_run_adds_up(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 10)
    energy = meter(tmp_path)
    energy.start()
    spend(path, 14)
    energy.after_step(NO_ARGUMENT, NO_ARGUMENT)
    spend(path, 500)  # between the two processes: not the run's
    again = meter(tmp_path)
    again.load_state_dict(energy.state_dict())
    again.start()
    spend(path, 501)
    again.after_step(NO_ARGUMENT, NO_ARGUMENT)
    assert again.joules == {"CPU package-0": 5.0}
    late = meter(tmp_path)
    late.load_state_dict({"joules": {}})
    late.start()
    assert late.joules == {}, "what was not read from the start would be a part of the energy, taken for the whole"


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert readable_counters(torch.device("cpu"), tmp_path / "none") == []
    unreadable = zone(tmp_path, "intel-rapl:0", "package-0", 10)
    (unreadable / "energy_uj").unlink()
    assert readable_counters(torch.device("cpu"), tmp_path) == []
    spend(unreadable, 10)
    energy = meter(tmp_path)
    energy.start()
    (unreadable / "energy_uj").write_text("garbage")
    energy.after_step(NO_ARGUMENT, NO_ARGUMENT)
    assert energy.joules == {}
