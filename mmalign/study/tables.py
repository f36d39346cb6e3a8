"""The tables of a study: scores with their differences from the base, contrasts, CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmalign.evaluation.document_scores import MEANS
from mmalign.evaluation.items import read_results
from mmalign.evaluation.metrics import percent
from mmalign.evaluation.tasks import TASKS, score_rows
from mmalign.files import markdown_table, replacing
from mmalign.study.checkpoint_noise import Noise, noise_of
from mmalign.study.contrasts import BASE, BASE_SEED, Answer, Question, RunKey, answer
from mmalign.study.identity import Orders
from mmalign.study.plan import Run, Variant
from mmalign.study.scores import VISUAL, RunScores, score

Scores = Mapping[RunKey, RunScores]
GAP = "-"


def own_metrics(scores: Scores) -> list[str]:
    """The tasks' own metrics and their means, in the order of tables."""
    found = {metric for run in scores.values() for metric in run}
    tasks = [task for task in TASKS.values() if task.kind != "vision"]  # pictures.py shows those
    own = [x.row for task in tasks for x in task.metrics if x.row in found]
    means = [x for x, members in MEANS.items() if set(members) <= set(own)]
    return own + means


def metrics_beside(scores: Scores) -> list[str]:
    """Those that resist artefacts: of ETHICS the means of its subsets, of mc1 the binary one."""
    own = {*own_metrics(scores), VISUAL}
    tasks = {name for name, task in TASKS.items() if task.kind != "vision"}
    found = [x.metric for run in scores.values() for x in run.values() if x.task in tasks]
    beside = [x for x in dict.fromkeys(found) if x not in own]
    means = {x: m for x, m in MEANS.items() if x not in own and set(m) <= {*beside, *own}}
    members = {metric for group in means.values() for metric in group}
    groups = {name for m in MEANS.values() for name in m}
    alone = [x for x in beside if x not in members and not any(x.startswith(y) for y in groups)]
    few = [x for x in alone if not x.startswith("truthfulqa_mc1") or x.endswith("_binary")]
    return few + list(means)


def mean_score(scores: Scores, parent: str, variant: str, metric: str) -> float | None:
    """Over the seeds."""
    of_seeds = [score(run, metric) for key, run in scores.items() if key[:2] == (parent, variant)]
    found = [x for x in of_seeds if x is not None]
    return float(np.mean(found)) if found else None


def gain(scores: Scores, parent: str, variant: str, metric: str) -> Answer:
    """Difference from the base."""
    question = Question("", "", f"{variant} - {BASE}", (metric,))
    return answer([question], scores, [parent])[0]


def score_table(
    orders: Orders, scores: Scores, variants: Sequence[Variant], metrics: Sequence[str]
) -> str:
    """Rows: every parent as it is and its variants; below, what is reached without reading."""
    rows = []
    for parent in orders.study.parents:
        shown = [x for x in variants if not x.parents or parent in x.parents]
        if not shown:
            continue
        base = (mean_score(scores, parent, BASE, metric) for metric in metrics)
        rows.append([parent, BASE, *(GAP if x is None else percent(x) for x in base)])
        for variant in shown:
            cells = [_cell(scores, parent, variant.name, metric) for metric in metrics]
            rows.append(["", variant.name, *cells])
    rows += _references(orders, metrics)
    return markdown_table(["parent", "variant", *map(short, metrics)], rows)


def short(metric: str) -> str:
    """A heading: the name without the group that the others share."""
    for group in ("truthfulqa_", "ethics_", f"{VISUAL}_"):
        metric = metric.removeprefix(group)
    return metric.replace("_", " ")


def _cell(scores: Scores, parent: str, variant: str, metric: str) -> str:
    value = mean_score(scores, parent, variant, metric)
    if value is None:
        return GAP
    found = gain(scores, parent, variant, metric).estimate
    if found is None:
        return percent(value)
    low, high = found.interval()
    text = f"{100 * found.value:+.1f} ± {100 * (high - low) / 2:.1f}"
    return f"{percent(value)} ({f'**{text}**' if low > 0 or high < 0 else text})"


def _references(orders: Orders, metrics: Sequence[str]) -> list[list[str]]:
    """Chance, and the best of the rules that never read the question."""
    rows = {}
    for run in orders.study.runs:
        if run.variant == BASE and orders.state(run) == "done":
            rows = score_rows(read_results(orders[run].scores)) | rows
    if not any(metric in rows for metric in metrics):
        return []
    chance = [rows.get(metric, {}).get("chance") for metric in metrics]
    rules = [rows.get(metric, {}).get("baselines") for metric in metrics]
    best = [max(x.items(), key=lambda rule: rule[1]) if x else None for x in rules]
    return [
        ["*chance*", "", *(GAP if x is None else percent(x) for x in chance)],
        ["*best rule that reads no question*", ""]
        + [f"{percent(x[1])} ({x[0]})" if x else GAP for x in best],
    ]


def contrast_table(answers: Sequence[Answer], noise: Noise) -> str:
    """With a column of `noise` where there is any."""
    rows = []
    for test in answers:
        found = test.estimate
        row = [test.question.name, f"`{test.question.contrast}`", test.parent, test.metric]
        if found is None:
            rows.append([*row, *[GAP] * (5 if noise else 4), test.verdict])
            continue
        low, high = (100 * bound for bound in found.interval())
        row += [f"{100 * found.value:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{test.p_holm:.2g}"]
        if noise:
            moved = noise_of(test, noise)
            row.append(GAP if moved is None else f"± {100 * moved:.1f}")
        rows.append([*row, f"{100 * test.detectable:.1f}", test.verdict])
    headings = ["question", "contrast", "parent", "metric", "points", "95%", "p (Holm)"]
    headings += ["checkpoints"] if noise else []
    return markdown_table([*headings, "detectable", "verdict"], rows, ":---")


# ---- CSV files ----


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with replacing(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_tables(
    folder: Path, orders: Orders, scores: Scores, answers: Sequence[Answer], noise: Noise
) -> None:
    """scores.csv: every metric of every run; contrasts.csv: every test; runs.csv: every run."""
    lines = []
    for (parent, variant, seed), run in scores.items():
        means = [name for name, members in MEANS.items() if set(members) <= run.keys()]
        for metric in [*run, *(x for x in means if x not in run)]:
            n = len(run[metric].values) if metric in run else ""
            lines.append((parent, variant, seed, metric, n, score(run, metric)))
    write_csv(folder / "scores.csv", ("parent", "variant", "seed", "metric", "n", "score"), lines)
    columns = ("question", "contrast", "family", "parent", "metric", "difference", "low", "high")
    columns += ("seed_error", "document_error", "degrees_of_freedom", "num_seeds", "p", "p_holm")
    write_csv(
        folder / "contrasts.csv",
        (*columns, "detectable", "checkpoint_noise", "verdict"),
        [_contrast_line(test, noise_of(test, noise)) for test in answers],
    )
    columns = ("parent", "variant", "seed", "state", "folder", "seconds", "reason")
    write_csv(folder / "runs.csv", columns, [_run_line(orders, run) for run in orders.study.runs])


def _contrast_line(test: Answer, noise: float | None) -> tuple:
    asked, found = test.question, test.estimate
    about = (asked.name, asked.contrast, asked.family, test.parent, test.metric)
    if found is None:
        return (*about, *[""] * 11, test.verdict)
    errors = (found.seed_error, found.document_error, found.degrees_of_freedom)
    numbers = (found.value, *found.interval(), *errors, test.num_seeds, test.p, test.p_holm)
    return (*about, *numbers, test.detectable, "" if noise is None else noise, test.verdict)


def _run_line(orders: Orders, run: Run) -> tuple:
    order, outcome = orders[run], orders[run].outcome()
    seconds = sum(outcome["seconds"].values()) if "seconds" in outcome else ""
    seed = "" if run.seed == BASE_SEED else run.seed
    state, reason = orders.state(run), outcome.get("reason", "")
    return (run.parent, run.variant, seed, state, order.folder.name, seconds, reason)
