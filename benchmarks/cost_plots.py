"""The cost benchmark's plots, PNG and SVG. Filled marks were measured, hollow ones computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cost_report import NAMES
from matplotlib.figure import Figure

MARKS = {"dedicated": ("s", "C3"), "swapped": ("^", "C1"), "polyhead": ("o", "C0")}


def write_plots(report: dict[str, Any], beside: Path) -> list[Path]:
    """Writes NAME_memory and NAME_throughput beside the JSON file."""
    rows = report["rows"]
    backbone = report["options"]["backbone"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_systems(left, rows, "memory_bytes", scale=1e-9)
    left.set(title=f"backbone {backbone}", ylabel="weights and adapters in memory (GB)", yscale="log")
    _draw_projection(right, report["projection"]["rows"])
    right.set(title="projection to Llama-2-7B, from byte counts", ylabel="GB", yscale="log")
    files = _save(figure, beside, "memory")
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_systems(axes, rows, "output_tokens_per_s")
    axes.set(title=f"one machine, {report['machine']['cores']} cores, {report['workload']['loop']}", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    return files + _save(figure, beside, "throughput")


def _draw_systems(axes: Any, rows: Sequence[dict[str, Any]], value: str, scale: float = 1.0) -> None:
    for system, (mark, colour) in MARKS.items():
        ours = [row for row in rows if row["system"] == system]
        axes.plot(*_points(ours, value, scale), color=colour, label=NAMES[system])
        for is_measured in (True, False):
            some = [row for row in ours if row["basis"].startswith("measured") is is_measured]
            axes.plot(*_points(some, value, scale), mark, color=colour, mfc=colour if is_measured else "white")
    _finish(axes, rows)
    axes.set_xlabel("fine-tunes of one backbone (filled: measured, hollow: computed)")


def _draw_projection(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for system in dict.fromkeys(row["system"] for row in rows):
        ours = [row for row in rows if row["system"] == system]
        axes.plot(*_points(ours, "memory_bytes", 1e-9), "o-", mfc="white", label=system)
    _finish(axes, rows)
    axes.set_xlabel("fine-tunes (all computed)")


def _points(rows: Sequence[dict[str, Any]], value: str, scale: float) -> tuple[list[int], list[float]]:
    return [row["fine_tunes"] for row in rows], [row[value] * scale for row in rows]


def _finish(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    counts = sorted({row["fine_tunes"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xticks([], minor=True)
    axes.grid(True, alpha=0.3)
    axes.legend()


def _save(figure: Figure, beside: Path, what: str) -> list[Path]:
    files = [beside.with_name(f"{beside.stem}_{what}{ending}") for ending in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
