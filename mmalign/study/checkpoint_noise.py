"""How far scores move between the last checkpoints of a run: the noise that no mean over documents
shows, after "Signal and Noise" (arXiv 2508.13144).

Known where [finetune] sets evaluation.every; the scores are those of training, on its documents.
"""

import math
from collections.abc import Mapping

import numpy as np

from mmalign.evaluation.items import is_finished, read_results
from mmalign.evaluation.tasks import score_rows
from mmalign.study.contrasts import BASE, Answer
from mmalign.study.identity import Order, Orders

LAST = 5  # checkpoints that count
FEWEST = 3  # a standard deviation of two says too little

# (parent, variant) -> metric -> standard deviation of a score, which is a share, 0 to 1
Noise = Mapping[tuple[str, str], Mapping[str, float]]


def checkpoint_noise(orders: Orders) -> Noise:
    """Root mean square over seeds; {} where no run was evaluated during its training."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in orders.study.runs:
        if run.is_evaluated and (deviations := _deviations(orders[run])):
            found.setdefault((run.parent, run.variant), []).append(deviations)
    return {
        names: {
            metric: math.sqrt(np.mean([seed[metric] ** 2 for seed in seeds]))
            for metric in set.intersection(*(set(seed) for seed in seeds))
        }
        for names, seeds in found.items()
    }


def _deviations(order: Order) -> dict[str, float]:
    """metric -> sample standard deviation over the run's last checkpoints."""
    folders = sorted(
        filter(is_finished, (order.train_dir / "evaluation").glob("step_*")),
        key=lambda folder: int(folder.name.removeprefix("step_")),
    )
    # step 0 is the base model
    trained = [folder for folder in folders if folder.name != "step_0"][-LAST:]
    if len(trained) < FEWEST:
        return {}
    tables = [score_rows(read_results(folder)) for folder in trained]
    shared = set.intersection(*(set(table) for table in tables))
    return {
        metric: float(np.std([table[metric]["acc"] for table in tables], ddof=1))
        for metric in shared
    }


def noise_of(test: Answer, noise: Noise) -> float | None:
    """Of a contrast: the noise of its variants, added in quadrature; None where it is unknown."""
    total = 0.0
    for variant, weight in test.contrast.variants:
        if variant == BASE:
            continue
        deviation = noise.get((test.parent, variant), {}).get(test.metric)
        if deviation is None:
            return None
        total += (weight * deviation) ** 2
    return math.sqrt(total)
