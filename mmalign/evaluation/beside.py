"""Metrics beside the tasks' own, summarised for results.json and compared between two models."""

from collections.abc import Iterable, Sequence

import numpy as np

from mmalign.evaluation.choice_scores import loglikelihoods
from mmalign.evaluation.document_scores import document_scores
from mmalign.evaluation.items import Items
from mmalign.evaluation.rules import is_hedge
from mmalign.evaluation.statistics import Z95, clustered_stderr, mean_of_tasks_interval
from mmalign.evaluation.tasks import MEANS, TASKS

METHOD = (
    "normal approximation, documents of one scenario or category counted together; metrics that "
    "several tasks share are not corrected for their number"
)


def summarize_beside(items: Items) -> dict[str, dict[str, dict]]:
    """task or mean -> kind -> {"acc", "interval" (95%), "n"}; means have no n."""
    rows = {}
    for name, scores in document_scores(items).items():
        interval = _interval(scores.values, scores.clusters, (0, 1))
        n = len(scores.values)
        rows[name] = {"acc": float(scores.values.mean()), "interval": interval, "n": n}
    return _by_task(rows, items, "acc")


def compare_beside(items_a: Items, items_b: Items) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Paired differences B - A by task and kind, and the metrics that only one of the two has.

    Rows: {"acc_a", "acc_b", "difference", "interval" (95%), "n"}. The items are of the same
    documents. A is the base of metrics that refer to one.
    """
    a, b = document_scores(items_a, items_a), document_scores(items_b, items_a)
    rows = {}
    for name in (x for x in a if x in b):
        difference = b[name].values - a[name].values  # (num_documents,)
        # an older evaluation does not know the categories
        clusters = min(a[name].clusters, b[name].clusters, key=lambda x: len(np.unique(x)))
        rows[name] = {
            "acc_a": float(a[name].values.mean()),
            "acc_b": float(b[name].values.mean()),
            "difference": float(difference.mean()),
            "interval": _interval(difference, clusters, (-1, 1)),
            "n": len(difference),
        }
    return _by_task(rows, items_a, "difference"), sorted(set(a) ^ set(b))


def _interval(
    values: np.ndarray, clusters: np.ndarray, bounds: tuple[float, float]
) -> tuple[float, float]:
    mean, spread = float(values.mean()), Z95 * clustered_stderr(values, clusters)
    return max(bounds[0], mean - spread), min(bounds[1], mean + spread)


def _by_task(rows: dict[str, dict], items: Items, center: str) -> dict[str, dict[str, dict]]:
    """task or mean -> kind -> row, without the tasks' own metrics; "interval" is of `center`."""
    found: dict[str, dict[str, dict]] = {}
    for task in items:
        kinds = [x.removeprefix(f"{task}_") for x in rows if x.startswith(f"{task}_")]
        own = {metric.row for metric in TASKS[task].metrics}
        of_task = {kind: rows[f"{task}_{kind}"] for kind in kinds if f"{task}_{kind}" not in own}
        if of_task:
            found[task] = of_task
    for name, mean in MEANS.items():
        members = [found.get(task, {}) for task in mean.members]
        for kind in members[0]:
            if all(kind in member for member in members):
                of_kind = [member[kind] for member in members]
                found.setdefault(name, {})[kind] = _mean_row(of_kind, center)
    return found


def _mean_row(rows: Sequence[dict], center: str) -> dict:
    keys = [key for key in rows[0] if key not in ("interval", "n")]
    mean: dict = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    centers, intervals = [row[center] for row in rows], [row["interval"] for row in rows]
    return mean | {"interval": mean_of_tasks_interval(centers, intervals)}


# ---- what a gain goes along with ----


def gain_and_style(
    items_a: Sequence[dict], items_b: Sequence[dict]
) -> dict[str, dict[str, float | None]]:
    """Correlations of TruthfulQA-mc2's gain from A to B with style: whether style explains it.

    {"length" (tokens), "hedges" (denials, "It depends", "I have no comment"): {"documents",
    "choices"}}. documents: Pearson's r over documents of the gain in score with how much longer the
    true choices are than the false ones, or how many more of them hedge. choices: r over choices of
    the gain in log-probability with length or hedging, both centred in their document, whether
    the choices are true or not. None where one of the two does not vary.
    """
    gain = np.array([b["score"] - a["score"] for a, b in zip(items_a, items_b, strict=True)])
    pairs = zip(loglikelihoods(items_a), loglikelihoods(items_b), strict=True)
    raised = _centred(b - a for a, b in pairs)
    found = {}
    for name, feature in {"length": lambda x: x["num_tokens"], "hedges": is_hedge}.items():
        styles = [np.array([float(feature(x)) for x in item["choices"]]) for item in items_a]
        true = [np.array(item["gold"], bool) for item in items_a]
        lead = [x[right].mean() - x[~right].mean() for x, right in zip(styles, true, strict=True)]
        found[name] = {
            "documents": correlation(gain, np.array(lead)),
            "choices": correlation(raised, _centred(styles)),
        }
    return found


def _centred(rows: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([row - row.mean() for row in rows])


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r; None where one of the two is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else None
