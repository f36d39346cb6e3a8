#!/usr/bin/env python
"""Writes the measured part of bench/RESULTS.md, and roofline plots, from bench/results/*/*.json.

python scripts/render_results.py

What stands above the marker in RESULTS.md is written by hand and kept.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from bench.record import read_parts  # noqa: E402
from bench.roofline import draw  # noqa: E402
from bench.table import duration  # noqa: E402
from bench.targets import Verdict, speedup, verdicts  # noqa: E402

RESULTS = REPOSITORY / "bench/results"
PATH = REPOSITORY / "bench/RESULTS.md"
MARKER = "<!-- From here on written by scripts/render_results.py out of bench/results/. -->"
PARTS = ("kernels", "train", "evaluate", "correctness", "build")
ROOFLINE = "roofline.png"
EXTRAS = {  # of a row's extra: heading and format
    "samples_per_second": ("samples/s", "{:,.4g}"),
    "target_samples_per_second": ("wanted by one GPU", "{:,.0f}"),
    "cores_for_target": ("cores for that", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "documents_per_second": ("documents/s", "{:,.4g}"),
    "tokens_computed": ("tokens computed", "{:,}"),
    "flops_needed": ("FLOPs needed", "{:.1%}"),
    "per_unit_over_least": ("a unit over the cheapest", "{:.2f}"),
    "time": ("time grows", "{}"),
    "memory": ("memory grows", "{}"),
    "mfu": ("MFU", "{:.1%}"),
    "padding": ("padding", "{:.0%}"),
    "power_watts": ("power", "{:.0f} W"),
    "passed": ("passed", "{}"),
    "failures": ("failed", "{}"),
    "errors": ("errors", "{}"),
}

Row = Mapping[str, object]


def render(machines: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Markdown of {machine: {part: content}}, as bench.record.read_parts gives it."""
    sections = [machine_section(name, parts) for name, parts in machines.items() if parts]
    if not sections:
        return "No benchmark has been recorded yet.\n"
    return "\n".join(sections)


def machine_section(name: str, parts: Mapping[str, Mapping]) -> str:
    first = next(iter(parts.values()))["machine"]
    lines = [f"## {first['device']}", "", f"Files: `bench/results/{name}/`.", ""]
    if _has_roofline(parts):
        lines += [f"![Roofline](results/{name}/{ROOFLINE})", ""]
    for part in sorted(parts, key=lambda part: PARTS.index(part) if part in PARTS else len(PARTS)):
        lines += part_section(name, part, parts[part])
    return "\n".join(lines)


def part_section(machine: str, part: str, content: Mapping) -> Iterator[str]:
    rows = content["records"]
    yield from (f"### {part}: {content['machine']['device']}", "")
    yield from machine_lines(content)
    measured = [row for row in rows if row["seconds"] is not None]
    table = comparison_table if part == "kernels" else program_tables
    if measured:
        yield from table(measured)
    yield from other_rows(rows)
    yield from target_table(verdicts(machine, part, rows))


def machine_lines(content: Mapping) -> Iterator[str]:
    """What was run, when, on what, and what this machine reached in the same run."""
    machine, limits = content["machine"], content["ceilings"]
    runs = {(r["run"]["date"], r["run"]["command"], r["run"]["commit"]) for r in content["records"]}
    for date, command, commit in sorted(runs, key=str):
        number, _, dirty = (commit or "unknown").partition("-")
        yield f"`{command}`, {date}, commit {number[:10]}{dirty and ' with changes'}."
    names = ("driver", "python", "torch", "triton", "system")
    yield ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name)) + "."
    if limits:
        rates = limits["matrix_flops_per_second"]
        reference = limits["matrix_reference"]
        yield (
            f"Ceilings of this run: copy {limits['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"product {reference} {flops(rates[reference])}."
        )
    yield ""
    if limits:
        yield from product_table(limits["matrix_flops_per_second"])


def product_table(rates: Mapping[str, float]) -> Iterator[str]:
    """The model's own products: a line for each layer and type, a column for each pass."""
    forms = ("forward", "grad_input", "grad_weight")
    cells: dict[str, dict[str, float]] = {}
    for name, rate in rates.items():
        *layer, form, dtype = name.split(" ")
        if form in forms:  # else a square product
            cells.setdefault(f"{' '.join(layer)}, {dtype}", {})[form] = rate
    lines = [
        [name, *(flops(found[form]) if form in found else "" for form in forms)]
        for name, found in cells.items()
    ]
    if lines:
        yield from markdown(["product at 16,384 tokens", *forms], lines)


# ---- tables ----


def comparison_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each case: our best variant, its share of the ceiling, and the best peer."""
    lines = []
    for group in groups(rows):
        ours = fastest(row for row in group if is_ours(row))
        peer = fastest(row for row in group if not is_ours(row))
        if ours is None:
            continue
        lines.append(
            [ours["benchmark"], ours["case"], ours["direction"], ours["variant"]]
            + [duration(ours["seconds"]), rate(ours), share(ours)]
            + ([peer["variant"], f"{speedup(ours, peer):.2f}x"] if peer else ["", ""])
        )
    headings = ["operation", "case", "", "ours", "time", "rate", "of ceiling", "best peer"]
    yield from markdown([*headings, "ours is faster"], lines)


def program_tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each benchmark."""
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        yield from (f"#### {name}", "")
        yield from variant_table([row for row in rows if row["benchmark"] == name])


def variant_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each variant; ratios are ours over it."""
    shown = [key for key in EXTRAS if any(key in row["extra"] for row in rows)]
    lines = []
    for group in groups(rows):
        ours = fastest(row for row in group if is_ours(row))
        for row in group:
            extra = [
                EXTRAS[key][1].format(row["extra"][key]) if key in row["extra"] else ""
                for key in shown
            ]
            ratio = "" if ours is None or is_ours(row) else f"{speedup(ours, row):.2f}x"
            lines.append(
                [row["case"], row["variant"], duration(row["seconds"]), *extra]
                + [share(row), memory(row), ratio]
            )
    headings = ["case", "variant", "time", *(EXTRAS[key][0] for key in shown)]
    yield from markdown([*headings, "of ceiling", "memory", "ours is faster"], lines)


def target_table(found: Sequence[Verdict]) -> Iterator[str]:
    lines = []
    for verdict in found:
        target, value = verdict.target, verdict.value
        outcome = {True: "met", False: f"missed by {verdict.distance}", None: ""}[verdict.met]
        shown = "not measured yet" if value is None else target.shown(value)
        lines.append([target.text, verdict.where, target.shown(target.bound), shown, outcome])
    if lines:
        yield from markdown(["target", "case", "asked", "measured", ""], lines)


def other_rows(rows: Sequence[Row]) -> Iterator[str]:
    """What was skipped and why, and rows that say something else than a time."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["skipped"]:
            reasons.setdefault((row["variant"], row["skipped"]), {})[row["benchmark"]] = None
    if reasons:
        yield from ("Not measured:", "")
        for (variant, reason), benchmarks in reasons.items():
            yield f"- {variant} ({', '.join(benchmarks)}): {reason}"
        yield ""
    for row in rows:
        if row["seconds"] is None and not row["skipped"]:
            said = [f"{key}: {value}" for key, value in row["extra"].items()]
            yield from (f"{row['benchmark']}, {row['case']}:", "", "```text", *said, "```", "")


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table without the columns that are empty everywhere."""
    used = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    for cells in (headings, ["---"] * len(headings), *lines):
        yield "| " + " | ".join(cells[i].replace("|", "\\|") for i in used) + " |"
    yield ""


# ---- cells ----


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row["benchmark"], row["case"], row["direction"]), []).append(row)
    return list(found.values())


def is_ours(row: Row) -> bool:
    return row["variant"].startswith("mmalign")


def fastest(rows: Iterator[Row]) -> Row | None:
    return min(rows, key=lambda row: row["seconds"], default=None)


def rate(row: Row) -> str:
    """In the unit of the ceiling that bounds the operation."""
    if row["ceiling"] is None:
        return ""
    if row["ceiling"] == "copy":
        return f"{row['bytes'] / row['seconds'] / 1e9:,.1f} GB/s"
    return flops(row["flops"] / row["seconds"])


def flops(per_second: float) -> str:
    unit, scale = ("TFLOP/s", 1e12) if per_second >= 1e12 else ("GFLOP/s", 1e9)
    return f"{per_second / scale:,.4g} {unit}"


def share(row: Row) -> str:
    return "" if row["share"] is None else f"{row['share']:.0%}"


def memory(row: Row) -> str:
    """At most, on a GPU; of a step on a CPU."""
    taken = row["peak_memory_bytes"] or row["extra"].get("step_memory_bytes")
    return f"{taken / 1e9:.2f} GB" if taken else ""


def _has_roofline(parts: Mapping[str, Mapping]) -> bool:
    kernels = parts.get("kernels", {})
    return bool(kernels.get("ceilings")) and any(row["flops"] for row in kernels["records"])


def main() -> None:
    machines = read_parts(RESULTS)
    head = PATH.read_text().partition(MARKER)[0].rstrip()
    PATH.write_text(f"{head}\n\n{MARKER}\n\n{render(machines)}")
    for name, parts in machines.items():
        if _has_roofline(parts):
            draw(parts["kernels"], RESULTS / name / ROOFLINE)


if __name__ == "__main__":
    main()
