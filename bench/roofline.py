"""The kernels of one machine against its measured ceilings, as a plot."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

MARKERS = {
    "forward": "^",
    "backward": "v",
    "both": "D",
    "step": "o",
    "loss only": "s",
    "score": "p",
}


def draw(content: Mapping, path: Path) -> None:
    """Plots a `kernels` part: FLOP/s by arithmetic intensity (FLOP a byte of the floor).

    Filled marks are ours, hollow ones the fastest peer of the same case.
    """
    limits = content["ceilings"]
    bandwidth = limits["copy_bytes_per_second"]
    peak = limits["matrix_flops_per_second"][limits["matrix_reference"]]
    rows = [row for row in content["records"] if row["seconds"] and row["flops"] and row["bytes"]]
    names = sorted({row["benchmark"] for row in rows})
    colors = {name: pyplot.cm.tab20(i % 20) for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    points = [row["flops"] / row["bytes"] for row in rows] + [peak / bandwidth]
    roof = (min(points) / 2, peak / bandwidth, max(points) * 2)
    axes.plot(roof, [min(x * bandwidth, peak) for x in roof], color="black")
    for row in _best(rows):
        ours = row["variant"].startswith("mmalign")
        color = colors[row["benchmark"]]
        axes.plot(
            row["flops"] / row["bytes"],
            row["flops"] / row["seconds"],
            marker=MARKERS[row["direction"]],
            color=color,
            markerfacecolor=color if ours else "none",
            linestyle="none",
        )
    for name in names:
        axes.plot([], [], color=colors[name], linewidth=5, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s")
    axes.set_title(
        f"{content['machine']['device']}: copy {bandwidth / 1e9:,.0f} GB/s, "
        f"{limits['matrix_reference']} {peak / 1e12:,.3g} TFLOP/s\n"
        "filled: mmalign, hollow: the fastest peer; ^ forward, v backward, D both, o step,\n"
        "square loss only, pentagon score"
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(True, which="both", alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _best(rows: list[Mapping]) -> list[Mapping]:
    """Of every case our fastest variant and the fastest other one."""
    found: dict[tuple, Mapping] = {}
    for row in rows:
        ours = row["variant"].startswith("mmalign")
        key = (row["benchmark"], row["case"], row["direction"], ours)
        if key not in found or row["seconds"] < found[key]["seconds"]:
            found[key] = row
    return list(found.values())
