"""The figures of report.md, drawn without a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmalign.evaluation.tasks import score_rows
from mmalign.files import replacing

# Okabe and Ito: safe for colour-blind eyes. The base model has the first, the tuned the second.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_SHAPES = ("o", "D", "s", "^")  # the next one when the colours are used up
_STAGE_COLORS = {"finetune": COLORS[1]}  # the tuned model's
_GREY = "#6b6b6b"
_MARKERS = {"always yes": "^", "always no": "v"}  # of constant answers; others follow
_OTHER_MARKERS = "sDPX*"
STYLE: dict[Any, object] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a name with $ is a name
}


@contextmanager
def drawing(
    path: Path, figsize: tuple[float, float], rows: int = 1, columns: int = 1, **panels: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its panels (rows, columns), written to `path` when the block ends.

    panels: options of Figure.subplots. Neither a matplotlibrc nor a backend changes the figure.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **panels)
        with replacing(path, "wb") as file:
            figure.savefig(file, format="png")


def plot_training(stages: dict[str, list[dict]], path: Path) -> None:
    """Loss and tokens/s over the optimizer steps; one column per stage. stages: metrics.jsonl."""
    size = (5 * len(stages), 5.2)
    with drawing(path, size, 2, len(stages), sharex="col", height_ratios=(2, 1)) as (figure, axes):
        for column, (name, records) in enumerate(stages.items()):
            loss, speed = axes[:, column]
            color = _STAGE_COLORS.get(name, COLORS[2])
            _plot_series(loss, records, "loss", color)
            _plot_series(speed, records, "tokens_per_second", color)
            loss.set_title(name, fontweight="bold")
            speed.set_ylim(bottom=0)
            speed.set_xlabel("optimizer step")
            speed.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            speed.yaxis.set_major_locator(MaxNLocator(nbins=4))
            speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("tokens/s")
        for axis in axes[0]:
            axis.legend()
        figure.align_ylabels()


def _plot_series(axes: Axes, records: list[dict], key: str, color: str) -> None:
    steps = np.array([record["step"] for record in records])
    values = np.array([record[key] for record in records])
    half = len(values) // 50
    axes.plot(
        steps, values, color=color, alpha=0.3 if half else 1.0, linewidth=0.8, label="one step"
    )
    if half:
        window = 2 * half + 1  # centred, so that the mean does not lag behind
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[half:-half], mean, color=color, label=f"mean of {window} steps")


def plot_scores(evaluations: dict[str, dict], path: Path) -> None:
    """Scores with 95% intervals beside chance and constant answers, model by model.

    evaluations: name -> results.json.
    """
    scored = {name: score_rows(results) for name, results in evaluations.items()}
    tasks = list(dict.fromkeys(task for rows in scored.values() for task in rows))
    places = {task: place for place, task in enumerate(tasks)}
    lanes = np.linspace(-0.3, 0.3, len(scored) + 1)  # of a row; the last: constant answers
    height = 1.5 + len(tasks) * (0.3 + 0.13 * len(scored))
    with drawing(path, (8.2, height)) as (figure, [[axes]]):
        axes.grid(axis="y", visible=False)
        for place in range(1, len(tasks), 2):  # bands lead the eye from the name to the marks
            axes.axhspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0)
        references = _plot_references(axes, scored, places, lanes[-1])
        models = []
        for index, (name, rows) in enumerate(scored.items()):
            centers = [places[task] + lanes[index] for task in rows]
            models.append(_plot_model(axes, name, list(rows.values()), index, centers))
        axes.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        lowest = min(row["interval"][0] for rows in scored.values() for row in rows.values())
        left = min(0, 10 * np.floor(10 * lowest))  # a difference of similarities can be negative
        axes.set_xlim(left, 100)
        axes.set_xlabel("score (%), with 95% interval")
        # 90 characters fit into the figure's width
        columns = max(1, min(5, 90 // (max(map(len, scored)) + 6)))
        figure.legend(handles=models, loc="outside upper center", ncols=columns)
        figure.legend(handles=references, loc="outside lower center", ncols=len(references))


def _plot_model(
    axes: Axes, name: str, summaries: list[dict], index: int, rows: list[float]
) -> ErrorbarContainer:
    color, shape = COLORS[index % len(COLORS)], _SHAPES[index // len(COLORS) % len(_SHAPES)]
    scores = [100 * summary["acc"] for summary in summaries]
    intervals = 100 * np.array([summary["interval"] for summary in summaries])
    errors = np.abs(intervals.T - scores)  # (2, num_tasks): below, above
    return axes.errorbar(
        *(scores, rows),
        xerr=errors,
        fmt=shape,
        color=color,
        markersize=5.5,
        elinewidth=1.6,
        label=name,
        clip_on=False,  # a score of 0 or 100 lies on the frame
    )


def _plot_references(
    axes: Axes, scored: dict[str, dict], places: dict[str, int], lane: float
) -> list[Artist]:
    """Chance and constant answers: they belong to the documents, not to a model."""
    references = {}
    for rows in scored.values():
        references |= rows
    chance = {place: references[task].get("chance") for task, place in places.items()}
    chance = {place: 100 * value for place, value in chance.items() if value is not None}
    handles: list[Artist] = []
    if chance:
        centers = np.array(list(chance))
        line = {"color": "black", "linewidth": 1.6, "label": "chance"}
        handles.append(axes.vlines(list(chance.values()), centers - 0.45, centers + 0.45, **line))
    points: dict[str, list[tuple[float, float]]] = {label: [] for label in _MARKERS}
    for task, place in places.items():
        constant = references[task].get("baselines", {})
        # a pair is yes and no in one wording or another
        labels = _MARKERS if len(constant) == len(_MARKERS) else constant
        for label, value in zip(labels, constant.values(), strict=True):
            points.setdefault(label, []).append((100 * value, place + lane))
    others = [label for label in points if label not in _MARKERS]
    markers = _MARKERS | dict(zip(others, cycle(_OTHER_MARKERS), strict=False))
    for label, found in points.items():
        if found:
            style = {"linestyle": "", "markersize": 6.5, "clip_on": False, "label": label}
            style |= {"markerfacecolor": "white", "markeredgecolor": _GREY}
            handles += axes.plot(*zip(*found, strict=True), marker=markers[label], **style)
    return handles


def plot_curves(curve: dict[int, dict], path: Path) -> None:
    """Score against step, one panel per task; lines: base model, chance, best constant answer.

    curve: step -> results.json; step 0 is the base model.
    """
    steps, scored = list(curve), [score_rows(results) for results in curve.values()]
    tasks = list(scored[0])
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (max(3.1 * columns, 6.2), 2.5 * rows + 0.5)
    with drawing(path, size, rows, columns, sharex=True) as (figure, axes):
        for axis, task in zip(axes.flat, tasks, strict=False):
            _plot_curve(axis, steps, [rows[task] for rows in scored])
            axis.set_title(task.replace("_", " "))
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for column in range(columns):  # the lowest panel of each column
            lowest = axes[(len(tasks) - 1 - column) // columns, column]
            lowest.set_xlabel("optimizer step")
            lowest.tick_params(labelbottom=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("score (%)")
        handles = {}  # a task without constant answers lacks one
        for axis in axes.flat:
            handles |= {
                handle.get_label(): handle for handle in axis.get_legend_handles_labels()[0]
            }
        figure.legend(handles=handles.values(), loc="outside upper center", ncols=len(handles))


def _plot_curve(axes: Axes, steps: list[int], summaries: list[dict]) -> None:
    scores = [100 * summary["acc"] for summary in summaries]
    low, high = 100 * np.array([summary["interval"] for summary in summaries]).T
    axes.fill_between(steps, low, high, color=COLORS[1], alpha=0.15, linewidth=0)
    axes.plot(steps, scores, color=COLORS[1], marker="o", markersize=4, label="this run")
    if steps[0] == 0:
        axes.axhline(scores[0], color=COLORS[0], linestyle="--", label="base model")
    chance = 100 * summaries[0]["chance"]
    axes.axhline(chance, color="black", linestyle=":", linewidth=1.2, label="chance")
    if constant := summaries[0].get("baselines"):
        best = 100 * max(constant.values())
        axes.axhline(best, color=_GREY, linestyle="-.", linewidth=1, label="best constant answer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
