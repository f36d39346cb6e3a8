"""Where gains come from: by category, against style, and against the share of yes."""

import math
from collections import defaultdict

import numpy as np

from mmalign.evaluation.beside import gain_and_style
from mmalign.evaluation.items import read_items
from mmalign.study.contrasts import BASE, BASE_SEED
from mmalign.study.identity import Orders
from mmalign.study.plan import PRETRAIN, Run
from mmalign.study.tables import Scores, gain

TRUTHFULNESS = "truthfulqa_mc2"
_YES_AND_GAIN = ("ethics_yes_rate_mean", "ethics_mean")


def category_gains(orders: Orders, scores: Scores) -> dict[str, dict[str, tuple[float, int]]]:
    """Variant -> category -> (gain over the base, documents), of the first parent with scores."""
    for parent in orders.study.parents:
        base = next(x for x in orders.study.runs if (x.parent, x.variant) == (parent, BASE))
        rows = _items(orders, base).get(TRUTHFULNESS, [])
        names = np.array([row.get("category") or "" for row in rows])
        if not len(names) or not names.all():
            continue
        reference = scores[parent, BASE, base.seed][TRUTHFULNESS].values
        gains = {}
        for variant in orders.study.variants:
            runs = [x[TRUTHFULNESS].values for k, x in scores.items() if k[:2] == (parent, variant)]
            if runs:
                gained = np.mean(runs, axis=0) - reference
                kinds = sorted(set(names))
                gains[variant] = {
                    x: (float(gained[names == x].mean()), int((names == x).sum())) for x in kinds
                }
        return gains
    return {}


def style_correlations(orders: Orders) -> dict[str, list[tuple[float, float, float]]]:
    """Variant -> (r of the gain with length, with hedging, the gain) of each of its runs.

    r is NaN where the choices of a document are all of one length, or none hedges.
    """
    found = defaultdict(list)
    bases = {run.parent: run for run in orders.study.runs if run.variant == BASE}
    for run in orders.study.runs:
        if run.variant in (BASE, PRETRAIN):
            continue
        base, own = (_items(orders, x).get(TRUTHFULNESS) for x in (bases[run.parent], run))
        if base is None or own is None:
            continue
        r = [x["choices"] for x in gain_and_style(base, own).values()]
        r = [math.nan if x is None else x for x in r]
        gained = np.mean([b["score"] - a["score"] for a, b in zip(base, own, strict=True)])
        if not np.isnan(r).all():
            found[run.variant].append((*r, float(gained)))
    return dict(found)


def _items(orders: Orders, run: Run) -> dict:
    return read_items(orders[run].scores) if orders.state(run) == "done" else {}


def yes_rates(scores: Scores) -> dict[str, list[tuple[float, float]]]:
    """Variant -> (change of the share of yes, gain in the mean of ETHICS) of each of its runs."""
    found = defaultdict(list)
    for parent, variant, seed in scores:
        one = {key: run for key, run in scores.items() if key[2] in (seed, BASE_SEED)}
        if variant != BASE:
            tests = [gain(one, parent, variant, metric) for metric in _YES_AND_GAIN]
            values = [test.estimate.value for test in tests if test.estimate]
            if len(values) == 2:
                found[variant].append((values[0], values[1]))
    return dict(found)
