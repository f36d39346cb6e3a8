"""The figures of a study's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmalign.evaluation.report.plots import COLORS, drawing
from mmalign.study.contrasts import Answer, RunKey
from mmalign.study.scores import RunScores, score
from mmalign.study.tables import mean_score, short

Scores = Mapping[RunKey, RunScores]
_COLOR = {
    "supported": COLORS[2],
    "contradicted": COLORS[1],
    "cannot tell": "#6b6b6b",
}


def plot_contrasts(answers: Sequence[Answer], path: Path) -> None:
    """A forest plot: every test with its 95% interval, and the margin of equivalences."""
    shown = [test for test in answers if test.estimate]
    with drawing(path, (8.2, 1.2 + 0.32 * len(shown))) as (figure, [[axes]]):
        axes.axvline(0, color="black", linewidth=1)
        for row, test in enumerate(shown):
            assert test.estimate is not None
            value, color = 100 * test.estimate.value, _COLOR[test.verdict]
            low, high = (100 * bound for bound in test.estimate.interval())
            if test.contrast.equivalence:
                margin = test.question.margin
                axes.fill_betweenx((row - 0.4, row + 0.4), -margin, margin, color="#e6e6e6")
            axes.plot((low, high), (row, row), color=color, linewidth=1.8)
            axes.plot(value, row, "o", color=color, markersize=5.5)
        names = [f"{x.question.name}: {x.question.contrast}\n{x.metric}, {x.parent}" for x in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=7)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("points, with 95% interval; grey band: the margin of equivalence")
        for verdict, color in _COLOR.items():
            axes.plot([], [], "o", color=color, label=verdict)
        figure.legend(loc="outside upper center", ncols=len(_COLOR))


def plot_amounts(answers: Sequence[Answer], scores: Scores, path: Path) -> bool:
    """Score against the amount of data, seed by seed; False where no question asks for a slope."""
    slopes = [test for test in answers if test.question.amounts and test.estimate]
    if not slopes:
        return False
    with drawing(path, (3.6 * len(slopes), 3.2), columns=len(slopes)) as (_, panels):
        for axes, test in zip(panels[0], slopes, strict=True):
            names = [name for name, _ in test.contrast.variants]
            means = [mean_score(scores, test.parent, name, test.metric) for name in names]
            for amount, name in zip(test.question.amounts, names, strict=True):
                runs = [run for key, run in scores.items() if key[:2] == (test.parent, name)]
                values = [x for run in runs if (x := score(run, test.metric)) is not None]
                axes.plot([amount] * len(values), 100 * np.array(values), ".", color=COLORS[4])
            shown = [np.nan if x is None else 100 * x for x in means]
            axes.plot(test.question.amounts, shown, "o-", color=COLORS[0])
            axes.set_xscale("log", base=2)
            axes.set_xticks(test.question.amounts, [f"{x:g}" for x in test.question.amounts])
            axes.set_title(f"{test.parent}: {short(test.metric)}")
            axes.set_xlabel("amount of data")
        panels[0, 0].set_ylabel("score (%)")
    return True


def plot_severities(
    curves: Mapping[str, Mapping[str, Mapping[int, float]]],
    constants: Mapping[str, float],
    path: Path,
) -> None:
    """curves: task -> name of the model -> severity -> score; a panel for each task."""
    with drawing(path, (3.4 * len(curves) + 2, 3.2), columns=len(curves)) as (figure, panels):
        for axes, (task, models) in zip(panels[0], curves.items(), strict=True):
            for index, (name, scores) in enumerate(models.items()):
                values = [100 * x for x in scores.values()]
                style = {"marker": "osD^v"[index // len(COLORS) % 5], "markersize": 4}
                color = COLORS[index % len(COLORS)]
                axes.plot(list(scores), values, color=color, label=name, **style)
            constant = 100 * constants[task]
            axes.axhline(constant, color="black", linestyle=":", label="best constant answer")
            axes.set_title(task.replace("_", " "))
            axes.set_xlabel("severity")
            axes.set_xticks(range(6))
        panels[0, 0].set_ylabel("score (%)")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def plot_categories(
    gains: Mapping[str, Mapping[str, tuple[float, int]]], metric: str, path: Path
) -> None:
    """gains: name of the variant -> category -> (gain over the base, number of documents)."""
    categories = sorted({name for found in gains.values() for name in found})
    with drawing(path, (8.2, 1.2 + 0.24 * len(categories))) as (figure, [[axes]]):
        axes.axvline(0, color="black", linewidth=1)
        for index, (name, found) in enumerate(gains.items()):
            rows = [categories.index(category) for category in found]
            values = [100 * value for value, _ in found.values()]
            sizes = [6 + number for _, number in found.values()]
            color = COLORS[index % len(COLORS)]
            axes.scatter(values, rows, s=sizes, color=color, alpha=0.7, label=name)
        axes.set_yticks(range(len(categories)), categories, fontsize=7)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_xlabel(f"gain in {short(metric)} over the base (points); area: documents")
        figure.legend(loc="outside upper center", ncols=min(4, len(gains)))


def plot_yes_rates(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """points: name of the variant -> (change of the share of yes, gain) of each of its runs."""
    with drawing(path, (5.6, 4.2)) as (figure, [[axes]]):
        axes.axhline(0, color="black", linewidth=1)
        axes.axvline(0, color="black", linewidth=1)
        for index, (name, found) in enumerate(points.items()):
            x, y = (100 * np.array(found)).T
            marker = "osD^v"[index // len(COLORS) % 5]
            color = COLORS[index % len(COLORS)]
            axes.plot(x, y, marker, color=color, label=name, markersize=5.5)
        axes.set_xlabel("change of the share of yes (points)")
        axes.set_ylabel("gain in the mean of ETHICS (points)")
        figure.legend(loc="outside right upper", fontsize=8)


def plot_styles(points: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """points: name of the variant -> (r with length, r with hedging, gain) of each of its runs."""
    with drawing(path, (8.2, 3.6), columns=2, sharey=True) as (figure, [panels]):
        for axes, style in zip(panels, ("length", "hedging"), strict=True):
            axes.axhline(0, color="black", linewidth=1)
            axes.axvline(0, color="black", linewidth=1)
            axes.set_xlim(-1, 1)
            axes.set_xlabel(f"r of a choice's gain with its {style}")
        panels[0].set_ylabel("gain in mc2 over the base (points)")
        for index, (name, found) in enumerate(points.items()):
            *styles, gains = np.array(found).T
            marker, color = "osD^v"[index // len(COLORS) % 5], COLORS[index % len(COLORS)]
            for axes, r in zip(panels, styles, strict=True):
                label = name if axes is panels[0] else None
                axes.plot(r, 100 * gains, marker, color=color, label=label, markersize=5.5)
        figure.legend(loc="outside right upper", fontsize=8)
