"""Scores of two models on the same documents."""

from collections.abc import Hashable, Sequence

import numpy as np

from mmalign.evaluation.statistics import bootstrap_means, mcnemar_p, percentile_interval


def compare_scores(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    groups: Sequence[Hashable],
    seed: int = 0,
    right_or_wrong: bool = False,
) -> tuple[dict, np.ndarray]:
    """A row of a comparison, and the resampled differences, (NUM_RESAMPLES,).

    {"acc_a", "acc_b", "difference": B - A, "interval": 95%, whole groups resampled, "n"}; of
    scores that are 0 or 1 (right_or_wrong) also {"lost", "gained": documents, "p": McNemar's}.
    """
    difference = np.subtract(scores_b, scores_a)  # (num_documents,)
    draws = bootstrap_means(difference, groups, seed)
    row = {
        "acc_a": float(np.mean(scores_a)),
        "acc_b": float(np.mean(scores_b)),
        "difference": float(difference.mean()),
        "interval": percentile_interval(draws),
        "n": len(difference),
    }
    if right_or_wrong:
        lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
        row |= {"lost": lost, "gained": gained, "p": mcnemar_p(lost, gained)}
    return row, draws
