"""What came of the cases, as a table to read; beside it, what the last committed run said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from last_results import print_origin

Row = dict[str, Any]

_COLUMNS = (
    "case",
    "ours tok/s",
    "peer",
    "peer tok/s",
    "ratio",
    "[least, greatest]",
    "target",
    "",
    "last ours",
    "ratio",
)


def print_report(report: Row, last: Row | None) -> None:
    machine = report["machine"]
    state = " with changes" if machine["uncommitted_changes"] else ""
    print(f"\n{machine['cpu']} ({', '.join(machine['isa'])}), {machine['cores']} cores; torch", end=" ")
    print(f"{machine['versions']['torch']}; commit {machine['commit'][:12]}{state}; seed {report['options']['seed']}")
    print(f"medians of {report['options']['repeats']} alternating runs; ratio: median of each pair of runs", end="")
    print("; a smoke run: its figures mean nothing\n" if report["options"]["quick"] else "\n")
    known = {row["key"]: row for row in last["cases"]} if last else {}
    print_columns([_COLUMNS, *(_cells(row, known.get(row["key"])) for row in report["cases"])])
    for row in report["cases"]:
        if "reason" in row:
            print(f"not measured: {row['key']}: {row['reason']}")
    print()
    for name, system in report["systems"].items():
        print(f"{name}: {_versions(system)}")
        said = " ".join(system["sanity"]["text"].split())
        print(f"    asked {report['sanity_question']!r}: {said!r}{'' if system['sanity']['ok'] else ': NOT SENSIBLE'}")
    print_origin(last, machine)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """The first and third columns are words, all others figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _cells(row: Row, last: Row | None) -> Sequence[str]:
    measured_last = last is not None and "ratio" in last
    before = (_rate(last["ours"]), f"{last['ratio']['median']:.2f}") if last and measured_last else ("", "")
    target = f"{row['target']:g}"
    if "ratio" not in row:
        return (row["title"], "-", row["peer"], "-", "-", "not measured", target, "", *before)
    ratio = row["ratio"]
    spread = f"[{ratio['min']:.2f}, {ratio['max']:.2f}]"
    verdict = "reached" if ratio["median"] >= row["target"] else "behind"
    return (
        row["title"], _rate(row["ours"]), row["peer"], _rate(row["theirs"]), f"{ratio['median']:.2f}", spread, target,
        verdict, *before,
    )  # fmt: skip


def _rate(figure: Row) -> str:
    return f"{figure['median']:.1f}"


def _versions(system: Row) -> str:
    facts = [f"{name} {version}" for name, version in system["versions"].items()]
    facts += [f"{name}={value}" for name, value in system["settings"].items() if name != "adapters"]
    return ", ".join(facts)
