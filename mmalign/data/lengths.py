"""Tokens per sample: their distribution, how far two files lie apart, and draws that match."""

from collections.abc import Sequence

import numpy as np


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of the two cumulative distributions, 0 to 1."""
    _, below_a, below_b = _cumulative(a, b)
    return float(np.abs(below_a - below_b).max())


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Area between the two cumulative distributions: tokens that a sample has to be moved by."""
    values, below_a, below_b = _cumulative(a, b)
    return float((np.abs(below_a - below_b)[:-1] * np.diff(values)).sum())


def _cumulative(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All values, rising, and the share of each sample that is not above them."""
    values = np.unique(np.concatenate((a, b)))
    below_a, below_b = (np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b))
    return values, below_a, below_b


def draw_lengths(
    wanted: np.ndarray, available: np.ndarray, random: np.random.RandomState
) -> np.ndarray:
    """Index of an available length for each wanted one: (num_wanted,).

    Each takes the closest that is left, the longest first, because long ones are rare; random among
    equal ones. None is drawn more often than the numbers of both make necessary.
    """
    values, index = np.unique(available, return_inverse=True)
    copies = -(-len(wanted) // len(available))
    left = np.bincount(index) * copies  # (num_values,)
    stocks = [random.permutation(np.flatnonzero(index == i)) for i in range(len(values))]
    order = random.permutation(len(wanted))
    drawn = np.empty(len(wanted), np.int64)
    for i in order[np.argsort(-wanted[order], kind="stable")]:
        closest = int(np.argmin(np.where(left > 0, np.abs(values - wanted[i]), np.inf)))
        left[closest] -= 1
        drawn[i] = stocks[closest][left[closest] % len(stocks[closest])]
    return drawn


def histogram_rows(lengths: Sequence[np.ndarray]) -> list[tuple[str, ...]]:
    """Share of samples by tokens, in bins that double: the bin, and a share for each array."""
    edges = bin_edges(lengths)
    rows = []
    for low, high in zip(edges, edges[1:], strict=False):
        shares = [np.mean((x >= low) & (x < high)) for x in lengths]
        if any(shares):
            label = f"{low:,} to {high - 1:,}" if high > low + 1 else f"{low:,}"
            rows.append((label, *(f"{share:.1%}" for share in shares)))
    return rows


def bin_edges(lengths: Sequence[np.ndarray]) -> list[int]:
    """1, 2, 4, ... beyond the longest."""
    return [2**i for i in range(int(max(x.max() for x in lengths)).bit_length() + 1)]


def summary(lengths: np.ndarray) -> dict[str, float]:
    """Of a file's samples: mean, median, 95th percentile, longest, and all together."""
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "percentile_95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "together": int(lengths.sum(dtype=np.int64)),
    }
