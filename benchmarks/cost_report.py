"""Prints the cost benchmark's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from last_results import print_origin

Row = dict[str, Any]

NAMES = {"dedicated": "N dedicated models", "swapped": "one, swapped", "polyhead": "Polyhead"}


def print_report(report: Row, last: Row | None) -> None:
    """Beside throughput and publication what the last committed run said of the same."""
    machine, backbone, options = report["machine"], report["backbone"], report["options"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores; torch {machine['versions']['torch']}", end="")
    print(f"; commit {machine['commit'][:12]}{' with changes' if machine['uncommitted_changes'] else ''}")
    print(
        f"backbone {options['backbone']} ({backbone['architecture']}, {backbone['parameters']:,} parameters): "
        f"{size(backbone['bytes_bf16'])} in bfloat16, {size(backbone['bytes_int8'])} in int8"
    )
    print("; ".join(f"{name}: {text}" for name, text in report["workload"].items() if isinstance(text, str)))
    print(f"\nmemory and throughput; medians of {options['repeats']} loops\n")
    _print_systems(report["rows"], last["rows"] if last else [])
    print(
        f"\ncost at {options['price_per_hour']:g} per machine-hour, {machine['memory_bytes'] / 2**30:.0f} GiB a "
        f"machine, {options['usable']:.0%} of it usable; 730 hours a month\n"
    )
    _print_costs(report["rows"])
    print("\nbytes per extra tenant\n")
    _print_tenants(report["bytes_per_extra_tenant"])
    _print_claim(report)
    print("\nfrom 'adapter published' (folder moved into place) to 'first token', over gRPC, measured\n")
    _print_publications(report["publications"], last["publications"] if last else [])
    _print_projection(report["projection"], options)
    print_origin(last, machine)


def _print_systems(rows: Sequence[Row], last: Sequence[Row]) -> None:
    before = {(row["fine_tunes"], row["system"]): f"{row['output_tokens_per_s']:.1f}" for row in last}
    lines = [("N", "system", "memory", "disk", "tok/s", "", "last tok/s", "rows/step", "swaps", "basis")]
    for row in rows:
        low, high = row["output_tokens_per_s_min"], row["output_tokens_per_s_max"]
        lines.append(
            (
                str(row["fine_tunes"]),
                NAMES[row["system"]],
                size(row["memory_bytes"]),
                size(row["disk_bytes"]) if "disk_bytes" in row else "",
                f"{row['output_tokens_per_s']:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                before.get((row["fine_tunes"], row["system"]), ""),
                f"{row['mean_rows']:.1f}",
                f"{row['swaps']:.0f}" if "swaps" in row else "",
                row["basis"],
            )
        )
    print_table(lines)
    for row in rows:
        if "first_tokens_as_polyhead" in row:
            share = row["first_tokens_as_polyhead"]
            print(f"N = {row['fine_tunes']}: {share:.0%} of the merged models' answers begin as Polyhead's do")


def _print_costs(rows: Sequence[Row]) -> None:
    header = ("N", "system", "demand tok/s", "machines", "(memory,", "demand)", "per month", "per fine-tune")
    lines = [(*header, "per 1M tokens")]
    for row in rows:
        cost = row["cost"]
        lines.append(
            (
                str(row["fine_tunes"]),
                NAMES[row["system"]],
                f"{row['demand_tokens_per_s']:.0f}",
                str(cost["machines"]),
                str(cost["machines_for_memory"]),
                str(cost["machines_for_demand"]),
                f"{cost['per_month']:,.0f}",
                f"{cost['per_month_per_fine_tune']:,.2f}",
                f"{row['cost_per_million_tokens']:,.2f}",
            )
        )
    print_table(lines)


def _print_tenants(tenants: Row) -> None:
    lines = [("system", "memory", "disk", "basis")]
    for name, entry in tenants.items():
        disk = size(entry["disk"]) if "disk" in entry else ""
        lines.append((name.replace("_", " "), size(entry["memory"]), disk, entry["basis"]))
    print_table(lines)


def _print_claim(report: Row) -> None:
    """'A few MB per task in place of several GB', as it stands for this backbone and for one of 7B."""
    tenants, seven = report["bytes_per_extra_tenant"], report["projection"]["shapes"]["Llama-2-7B"]
    ours, whole = tenants["polyhead"]["memory"], tenants["dedicated_bf16"]["memory"]
    theirs = next(iter(seven["adapters"].items()))
    print(
        f"\n'a few MB per task in place of several GB': here {size(ours)} in place of {size(whole)} in bfloat16 "
        f"({whole / ours:.0f} times) or {size(tenants['dedicated']['memory'])} in int8, measured; this backbone is too "
        f"small for GB. For Llama-2-7B {size(theirs[1])} ({theirs[0]}) in place of {size(seven['bf16'])} in bfloat16 "
        f"({seven['bf16'] / theirs[1]:.0f} times), computed from byte counts."
    )


def _print_publications(publications: Sequence[Row], last: Sequence[Row]) -> None:
    before = {one["registered_adapters"]: one for one in last}
    titles = ("adapters there", "times", "published to first token, ms", "", "last", "the same again, ms", "", "last")
    lines: list[tuple[str, ...]] = [titles]
    for one in publications:
        earlier = before.get(one["registered_adapters"])
        cells = [str(one["registered_adapters"]), str(len(one["publications"]))]
        for name in ("published_to_first_token_s", "again_to_first_token_s"):
            low, high = one[f"{name}_min"] * 1000, one[f"{name}_max"] * 1000
            cells += [f"{one[f'{name}_median'] * 1000:.0f}", f"[{low:.0f}, {high:.0f}]"]
            cells.append(f"{earlier[f'{name}_median'] * 1000:.0f}" if earlier else "")
        lines.append(tuple(cells))
    print_table(lines)


def _print_projection(projection: Row, options: Row) -> None:
    print("\nbytes by counting (int8 as Polyhead holds it; adapters in the device pool)\n")
    recipes = list(projection["shapes"]["Llama-2-7B"]["adapters"])
    lines = [("shape", "parameters", "bf16", "int8", *recipes, "of the bf16 model")]
    for name, shape in projection["shapes"].items():
        adapters = [shape["adapters"][recipe] for recipe in recipes]
        shares = " / ".join(f"{adapter / shape['bf16']:.2%}" for adapter in adapters)
        cells = (size(shape["bf16"]), size(shape["int8"]), *map(size, adapters), shares)
        lines.append((name, f"{shape['parameters']:,}", *cells))
    print_table(lines)
    counted = projection["counted_int8_bytes_of_this_backbone"]
    measured = projection["measured_int8_bytes_of_this_backbone"]
    print(f"check: this backbone's int8 bytes are {counted:,} by counting and {measured:,} in memory")
    print(
        f"\nprojection to Llama-2-7B, computed from byte counts alone (no throughput): GPUs of {options['gpu_gib']:g} "
        f"GiB at {options['price_per_gpu_hour']:g} per hour, {options['usable']:.0%} usable\n"
    )
    rows: list[tuple[str, ...]] = [("N", "system", "memory", "GPUs", "per month", "per fine-tune")]
    for row in projection["rows"]:
        cost = row["cost"]
        money = (f"{cost['per_month']:,.0f}", f"{cost['per_month_per_fine_tune']:,.2f}")
        memory = size(row["memory_bytes"])
        rows.append((str(row["fine_tunes"]), row["system"], memory, str(cost["machines"]), *money))
    print_table(rows)


def size(num_bytes: float) -> str:
    """In decimal units, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{3 if num_bytes < 999.5 * factor else 4}g} {unit}"
    return f"{num_bytes:.0f} B"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Right-aligned columns; the last one, if it is text, to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last_is_text = rows[0][-1] == "basis"
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if last_is_text:
            cells[-1] = row[-1]
        print("  ".join(cells).rstrip())
