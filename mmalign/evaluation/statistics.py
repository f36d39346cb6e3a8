"""Uncertainty of scores: Wilson intervals, bootstrap over documents, McNemar's test."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile at 0.975
NUM_RESAMPLES = 10_000


def wilson_interval(mean: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion seen in n independent trials (Wilson 1927)."""
    spread = Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    center, scale = mean + Z95**2 / (2 * n), 1 + Z95**2 / n
    return (max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale))


def effective_n(scores: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many independent documents say as much as these, which come in groups.

    n over the design effect of the groups (Kish 1965), never more than n: answers to one scenario
    tend to be right or wrong together. Where all are right or all wrong the effect cannot be
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


def mean_of_tasks_interval(
    means: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Interval of the unweighted mean of independent scores from their own intervals.

    The distances from each score to its bounds add in quadrature (Zou and Donner 2008).
    """
    mean, k = float(np.mean(means)), len(means)
    below = math.hypot(*(m - low for m, (low, _) in zip(means, intervals, strict=True))) / k
    above = math.hypot(*(high - m for m, (_, high) in zip(means, intervals, strict=True))) / k
    return mean - below, mean + above


def group_sums(
    values: Sequence[float], groups: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group: two arrays of (num_groups,)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def bootstrap_means(
    values: Sequence[float], groups: Sequence[Hashable], seed: int = 0
) -> np.ndarray:
    """Means of NUM_RESAMPLES resamples of whole groups with replacement: (NUM_RESAMPLES,).

    Where there are few kinds of groups, as with right and wrong answers, equal ones are drawn
    together as one multinomial count, which is the same distribution and faster.
    """
    sums, sizes = group_sums(values, groups)
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    random, n = np.random.default_rng(seed), len(sums)
    if len(kinds) < n / 16:
        draws = random.multinomial(n, counts / n, size=NUM_RESAMPLES)  # (NUM_RESAMPLES, num_kinds)
        return (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    means = np.empty(NUM_RESAMPLES)
    for part in np.split(means, 100):  # views, small enough for the cache
        drawn = random.integers(n, size=(len(part), n))
        part[:] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar_p(only_a_right: int, only_b_right: int) -> float:
    """Exact two-sided p of McNemar's test: are the discordant documents split evenly?"""
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
