"""The report's section on tasks about pictures: a table, and a figure of scores by severity."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mmalign.evaluation.corruptions import parse_corruptions
from mmalign.evaluation.items import read_results
from mmalign.evaluation.metrics import percent
from mmalign.evaluation.tasks import TASKS, picture_tasks
from mmalign.files import markdown_table
from mmalign.study.figures import plot_severities
from mmalign.study.identity import Orders
from mmalign.study.pictures import BESIDE, OVER_CORRUPTED
from mmalign.study.tables import GAP, Scores, mean_score

_LEAST_SKILL = 0.05  # above the best constant answer: of less, no share is worth a number


def sight(folder: Path, orders: Orders, scores: Scores) -> Iterator[str]:
    """A table of all tasks, and a figure of scores by severity."""
    tasks = [x for x in picture_tasks(orders.study.settings.tasks) if _have(scores, x)]
    if not tasks:
        return
    constants = _constants(orders)
    yield "## Sight"
    rows = [row for task in tasks for row in _rows(orders, scores, task, constants[task])]
    headings = ["task", "parent", "variant", "own picture", *orders.evaluation.controls]
    yield markdown_table([*headings, "corrupted", "kept", "AUROC", "yes"], rows)
    yield (
        "Percent, mean over seeds; CIDEr as papers print it. corrupted: mean over "
        f"{', '.join(orders.evaluation.corruptions) or 'none'}; kept: what that leaves of the "
        "distance to the best constant answer, from 5 points on. AUROC: of the log-odds of yes in "
        "the first word (ours); yes: share of yes among the answers."
    )
    if orders.evaluation.corruptions:
        curves = {task: _curves(orders, scores, task) for task in tasks}
        plot_severities(curves, constants, folder / "corruptions.png")
        yield "![Score by severity of the corruption](corruptions.png)"


def _have(scores: Scores, metric: str) -> dict[tuple[str, str], None]:
    """(parent, variant) of the runs that have the metric, in order."""
    return {key[:2]: None for key, run in scores.items() if metric in run}


def _constants(orders: Orders) -> dict[str, float]:
    """Task -> score of the best constant answer."""
    found = {}
    for run in orders.study.runs:
        folders = orders[run].pictures.glob("*/results.json")
        for results in (read_results(x.parent) for x in folders):
            of_tasks = {x: results[x] for x in results if x in TASKS}
            found |= {x: max(row["baselines"].values()) for x, row in of_tasks.items()}
    return found


def _rows(orders: Orders, scores: Scores, task: str, constant: float) -> list[list[str]]:
    controls, rows = orders.evaluation.controls, []
    for parent, variant in _have(scores, task):
        mean = partial(mean_score, scores, parent, variant)
        own, lost = mean(task), mean(f"{task}_{OVER_CORRUPTED}")
        corrupted = None if own is None or lost is None else own - lost
        shown = [own, *(mean(f"{task}_{x}") for x in controls), corrupted]
        values = [*shown, _kept(own, corrupted, constant), *(mean(f"{task}_{x}") for x in BESIDE)]
        rows.append([task, parent, variant, *(GAP if x is None else percent(x) for x in values)])
    blank = [""] * (len(rows[0]) - 4)
    return [*rows, [task, "*best constant answer*", "", percent(constant), *blank]]


def _kept(own: float | None, corrupted: float | None, constant: float) -> float | None:
    if own is None or corrupted is None or own < constant + _LEAST_SKILL:
        return None
    return (corrupted - constant) / (own - constant)


def _curves(orders: Orders, scores: Scores, task: str) -> dict[str, dict[int, float]]:
    """Name of the model -> severity -> score, mean over types and seeds; 0: as they are."""
    curves = {}
    wanted = parse_corruptions(orders.evaluation.corruptions)
    for parent, variant in _have(scores, task):
        found: dict[int, list[float]] = {}
        shown = [(0, task), *((level, f"{task}_{name}-{level}") for name, level in wanted)]
        for severity, metric in shown:
            value = mean_score(scores, parent, variant, metric)
            if value is not None:
                found.setdefault(severity, []).append(value)
        curves[f"{parent}, {variant}"] = {x: float(np.mean(y)) for x, y in sorted(found.items())}
    return curves
