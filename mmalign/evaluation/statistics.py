"""Uncertainty of scores: Wilson intervals, bootstrap over documents, paired tests."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

Z95 = NormalDist().inv_cdf(0.975)
NUM_RESAMPLES = 10_000


def wilson_interval(mean: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion seen in n independent trials (Wilson 1927)."""
    spread = Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    center, scale = mean + Z95**2 / (2 * n), 1 + Z95**2 / n
    low, high = (center - spread) / scale, (center + spread) / scale
    # rounding must not exclude a mean of exactly 0 or 1
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))


def effective_n(scores: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Number of independent documents that carry as much information as these grouped ones.

    n divided by the design effect of the groups (Kish 1965), at most n: answers about one scenario
    tend to be right or wrong together. When all are right or all are wrong, the effect cannot be
    estimated, and every group counts once.
    """
    sums, sizes = group_sums(scores, groups)
    n, mean = len(scores), float(np.mean(scores))
    independent = mean * (1 - mean) / n
    if independent == 0 or len(sums) < 2:
        return float(len(sums))
    residuals = sums - mean * sizes
    clustered = len(sums) / (len(sums) - 1) * float(residuals @ residuals) / n**2
    return n / max(1.0, clustered / independent)


def clustered_stderr(values: ArrayLike, clusters: ArrayLike | Sequence[Hashable]) -> float:
    """Standard error of the mean of values that depend on each other within clusters.

    The sandwich estimate with G / (G - 1), as in Miller 2024 (arXiv 2411.00640); infinite for a
    single cluster.
    """
    values = np.asarray(values, np.float64)
    sums, _ = group_sums(values - values.mean(), clusters)
    if len(sums) < 2:
        return math.inf
    return math.sqrt(len(sums) / (len(sums) - 1) * float(sums @ sums)) / len(values)


def mean_of_tasks_interval(
    means: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Interval of the unweighted mean of independent scores, from their own intervals.

    The distances from each score to its bounds add in quadrature (Zou and Donner 2008).
    """
    mean, k = float(np.mean(means)), len(means)
    below = math.hypot(*(m - low for m, (low, _) in zip(means, intervals, strict=True))) / k
    above = math.hypot(*(high - m for m, (_, high) in zip(means, intervals, strict=True))) / k
    return mean - below, mean + above


def group_sums(
    values: ArrayLike, groups: ArrayLike | Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group: two arrays of (num_groups,)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def bootstrap_means(values: ArrayLike, groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """Means of NUM_RESAMPLES resamples of whole groups with replacement: (NUM_RESAMPLES,).

    When few distinct groups exist, as with right and wrong answers, equal ones are drawn together
    as one multinomial count: the same distribution, and faster.
    """
    sums, sizes = group_sums(values, groups)
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    random, n = np.random.default_rng(seed), len(sums)
    if len(kinds) < n / 16:
        draws = random.multinomial(n, counts / n, size=NUM_RESAMPLES)  # (NUM_RESAMPLES, num_kinds)
        return (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    means = np.empty(NUM_RESAMPLES)
    for chunk in np.split(means, 100):  # views, small enough for the cache
        drawn = random.integers(n, size=(len(chunk), n))
        chunk[:] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare_scores(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    groups: Sequence[Hashable],
    seed: int = 0,
    right_or_wrong: bool = False,
) -> tuple[dict, np.ndarray]:
    """Paired scores of two models on the same documents, and the resampled differences.

    {"acc_a", "acc_b", "difference": B - A, "interval": 95%, whole groups resampled, "n"}; for
    scores that are 0 or 1 (right_or_wrong) also {"lost", "gained": documents, "p": McNemar's}.
    The resampled differences are (NUM_RESAMPLES,).
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


def mcnemar_p(only_a_right: int, only_b_right: int) -> float:
    """Exact two-sided p of McNemar's test of whether discordant documents split evenly."""
    n, least = only_a_right + only_b_right, min(only_a_right, only_b_right)
    tail, ways = 0, 1  # Python integers: exact for any n
    for k in range(least + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)  # n choose k + 1
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
