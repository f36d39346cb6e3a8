"""Renders bench/RESULTS.md and the roofline plots from pytest-benchmark's JSON files.

python -m bench.render              bench/RESULTS.md, from bench/results/*/*.json
python -m bench.render --check      exits with 1 where RESULTS.md is not current
python -m bench.render FILE ...     the tables of these files, on the terminal

What is above the marker in RESULTS.md is written by hand and kept.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.comparison import COPY, is_ours, speedup
from mmalign.command import command_line
from mmalign.errors import UserError
from mmalign.files import read_json, write_text

FOLDER = Path(__file__).parent
RESULTS, PATH = FOLDER / "results", FOLDER / "RESULTS.md"
MARKER = "<!-- From here on written by `python -m bench.render` out of bench/results/. -->"
ROOFLINE, VERDICT = "roofline.png", "verdict.md"
COLUMNS = {  # of extra_info: heading and format
    "samples_per_second": ("samples/s", "{:,.4g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "requests_per_second": ("requests/s", "{:,.4g}"),
    "tokens_computed": ("tokens computed", "{:,}"),
    "flops_required": ("FLOPs required", "{:.1%}"),
    "cost_per_unit": ("cost per unit over the lowest", "{:.2f}"),
    "mfu": ("MFU", "{:.1%}"),
    "padding": ("padding", "{:.0%}"),
    "recompute": ("recomputation", "{}"),
    "share_of_peak": ("share of peak", "{:.0%}"),
    "peak_memory_bytes": ("memory", "{}"),
}
MARKERS = dict(
    zip(("forward", "backward", "both", "step", "loss only", "score"), "^vDosp", strict=True)
)


@dataclass(frozen=True)
class Entry:
    benchmark: str
    case: str
    direction: str
    variant: str
    seconds: float  # the median
    info: Mapping[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        return self.benchmark, self.case, self.direction

    def over(self, other: "Entry") -> str:
        return f"{speedup((self.seconds, self.info), (other.seconds, other.info)):.2f}x"

    @property
    def rate(self) -> str:
        """In the unit of the peak that bounds the operation."""
        if "bound" not in self.info:
            return ""
        if self.info["bound"] == COPY:
            return f"{self.info['bytes'] / self.seconds / 1e9:,.1f} GB/s"
        return flops(self.info["flops"] / self.seconds)

    def cell(self, column: str) -> str:
        value = self.info.get(column)
        if column == "peak_memory_bytes":
            total = (value or 0) + self.info.get("resident_memory_bytes", 0)
            value = f"{total / 1e9:.2f} GB" if total else None
        return "" if value is None else COLUMNS[column][1].format(value)


def entries(content: Mapping) -> list[Entry]:
    """Of one of pytest-benchmark's files."""
    return [
        Entry(**row["params"], seconds=row["stats"]["median"], info=row["extra_info"])
        for row in content["benchmarks"]
    ]


def groups(rows: Iterable[Entry]) -> list[list[Entry]]:
    found: dict[tuple, list[Entry]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return list(found.values())


def fastest(rows: Iterable[Entry]) -> Entry | None:
    return min(rows, key=lambda row: row.seconds, default=None)


# ---- the document ----


def render(machines: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Markdown of {machine: {file name: content}}."""
    sections = ["\n".join(_machine(name, files)) for name, files in machines.items() if files]
    return "\n".join(sections) or "No benchmark has been recorded yet.\n"


def _machine(name: str, files: Mapping[str, Mapping]) -> Iterator[str]:
    device = next((c["machine_info"]["device"] for c in files.values() if "benchmarks" in c), name)
    yield from (f"## {device}", "")
    if (RESULTS / name / ROOFLINE).exists():
        yield from (f"![Roofline](results/{name}/{ROOFLINE})", "")
    for file, content in files.items():
        if file == VERDICT:
            yield from ("### bash scripts/gpu_verify.sh", "", str(content))
        else:
            yield from (f"### {file}", "", *tables(content))


def tables(content: Mapping) -> Iterator[str]:
    """What was run on what, the measured peaks, the figures, and what was not measured."""
    machine, commit, peaks = (
        content[key] for key in ("machine_info", "commit_info", "measured_peaks")
    )
    changed = " with changes" if commit.get("dirty") else ""
    date, number = content["datetime"][:10], commit["id"][:10]
    yield f"`{content['command']}`, {date}, commit {number}{changed}."
    names = ("driver", "vectors", "threads", "python", "torch", "mkl", "onednn", "triton", "system")
    yield ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name)) + "."
    if content.get("gpu"):
        gpu = content["gpu"]
        yield (
            f"Medians of the run: SM clock {gpu['sm_clock_mhz']:.0f} MHz, power "
            f"{gpu['power_watts']:.0f} W; throttled in {gpu['throttled']:.0%} of the samples."
        )
    yield (
        f"Measured peaks of this run: copy {peaks['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"{peaks['matmul']} {flops(peaks['matmul_flops_per_second'])}."
    )
    yield ""
    found = groups(entries(content))
    kernels = [group for group in found if any("bytes" in row.info for row in group)]
    yield from kernel_table(kernels)
    programs = [group for group in found if group not in kernels]
    for benchmark in dict.fromkeys(group[0].benchmark for group in programs):
        yield from (f"#### {benchmark}", "")
        yield from program_table([g for g in programs if g[0].benchmark == benchmark])
    yield from _not_measured(content["not_measured"])


def kernel_table(found: Sequence[list[Entry]]) -> Iterator[str]:
    """A line per case: our fastest variant, its share of the peak, and the fastest peer."""
    lines = []
    for group in found:
        ours = fastest(row for row in group if is_ours(row.variant))
        peer = fastest(row for row in group if not is_ours(row.variant))
        if ours is not None:
            cells = [*ours.group, ours.variant, duration(ours.seconds), ours.rate]
            peers = [peer.variant, ours.over(peer)] if peer else ["", ""]
            lines.append([*cells, ours.cell("share_of_peak"), *peers])
    headings = ["operation", "case", "direction", "ours", "time", "rate", "share of peak"]
    yield from markdown([*headings, "best peer", "ours over it"], lines)


def program_table(found: Sequence[list[Entry]]) -> Iterator[str]:
    """A line per variant; ratios are our fastest over it."""
    lines = []
    for group in found:
        ours = fastest(row for row in group if is_ours(row.variant))
        for row in group:
            ratio = ours.over(row) if ours and not is_ours(row.variant) else ""
            cells = [row.case, row.variant, duration(row.seconds)]
            lines.append([*cells, *(row.cell(column) for column in COLUMNS), ratio])
    headings = ["case", "variant", "time", *(heading for heading, _ in COLUMNS.values())]
    yield from markdown([*headings, "ours over it"], lines)


def _not_measured(reasons: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    if reasons:
        yield from ("Not measured:", "")
        for variant, found in reasons.items():
            for reason, benchmarks in found.items():
                yield f"- {variant} ({', '.join(benchmarks)}): {reason}"
        yield ""


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table without the columns that are empty everywhere."""
    used = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    for cells in (headings, ["---"] * len(headings), *lines) if lines else ():
        yield "| " + " | ".join(cells[i].replace("|", "\\|") for i in used) + " |"
    if lines:
        yield ""


def flops(per_second: float) -> str:
    unit, scale = ("TFLOP/s", 1e12) if per_second >= 1e12 else ("GFLOP/s", 1e9)
    return f"{per_second / scale:,.4g} {unit}"


def duration(seconds: float) -> str:
    unit, scale = next((x for x in (("s", 1), ("ms", 1e3)) if seconds * x[1] >= 1), ("us", 1e6))
    return f"{seconds * scale:.4g} {unit}"


# ---- the plot ----


def draw_roofline(files: Mapping[str, Mapping], path: Path) -> None:
    """FLOP/s over FLOP per byte of every kernel: filled ours, hollow the fastest peer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    benchmarks = {name: content for name, content in files.items() if "benchmarks" in content}
    rows = [row for content in benchmarks.values() for row in entries(content)]
    counted = [row for row in rows if row.info.get("bytes") and row.info.get("flops")]
    if not counted:
        return
    best = []
    for group in groups(counted):
        for ours in (True, False):
            best.append(fastest(row for row in group if is_ours(row.variant) == ours))
    rows = [row for row in best if row is not None]
    first = next(iter(benchmarks.values()))
    bandwidth = first["measured_peaks"]["copy_bytes_per_second"]
    peak = first["measured_peaks"]["matmul_flops_per_second"]
    names = sorted({row.benchmark for row in rows})
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    figure = Figure((9, 5.5))
    axes = figure.subplots()
    intensity = [row.info["flops"] / row.info["bytes"] for row in rows]
    roof = (min(intensity) / 2, peak / bandwidth, max(*intensity, peak / bandwidth) * 2)
    axes.plot(roof, [min(x * bandwidth, peak) for x in roof], color="black")
    for row, x in zip(rows, intensity, strict=True):
        color, fill = colors[row.benchmark], is_ours(row.variant)
        style = {"marker": MARKERS[row.direction], "color": color, "linestyle": "none"}
        style["markerfacecolor"] = color if fill else "none"
        axes.plot(x, row.info["flops"] / row.seconds, **style)
    for name in names:
        axes.plot([], [], color=colors[name], linewidth=5, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s")
    axes.set_title(
        f"{first['machine_info']['device']}: copy {bandwidth / 1e9:,.0f} GB/s, "
        f"{first['measured_peaks']['matmul']} {flops(peak)}\n"
        "filled: mmalign, hollow: the fastest peer; ^ forward, v backward, D both, o step,\n"
        "square loss only, pentagon score"
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


# ---- the command ----


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """{machine: {file name: content}} of a folder of results."""
    found = {}
    for path in sorted(x for x in folder.iterdir() if x.is_dir()):
        contents = {x.name: json.loads(x.read_text()) for x in sorted(path.glob("*.json"))}
        verdicts = {x.name: x.read_text() for x in path.glob(VERDICT)}  # of bench/gpu.py
        found[path.name] = verdicts | contents
    return found


def _tables_of(path: str) -> str:
    content = read_json(path, "Expected --check, or files that pytest bench/ has written.")
    try:
        return "\n".join(tables(content))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by pytest bench/ ({type(error).__name__}: {error})"
        ) from error


def main(arguments: Sequence[str]) -> None:
    if arguments and [*arguments] != ["--check"]:
        for path in arguments:
            print(_tables_of(path))
        return
    machines, before = read(RESULTS), PATH.read_text()
    head = before.partition(MARKER)[0].rstrip()
    if arguments:
        current = before == f"{head}\n\n{MARKER}\n\n{render(machines)}"
        sys.exit(0 if current else "bench/RESULTS.md is not current: python -m bench.render")
    for name, files in machines.items():
        draw_roofline(files, RESULTS / name / ROOFLINE)
    write_text(PATH, f"{head}\n\n{MARKER}\n\n{render(machines)}")


if __name__ == "__main__":
    with command_line():
        main(sys.argv[1:])
