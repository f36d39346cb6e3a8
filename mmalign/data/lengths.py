"""Supervised tokens per sample of two files: how far they lie apart, and draws that match them."""

import numpy as np
from rich.table import Table


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


def histogram_table(names: tuple[str, str], lengths: tuple[np.ndarray, np.ndarray]) -> Table:
    """Share of samples by supervised tokens, in bins that double, and the two distances."""
    table = Table("supervised tokens per sample")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    edges = [2**i for i in range(int(max(x.max() for x in lengths)).bit_length() + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        shares = [np.mean((x >= low) & (x < high)) for x in lengths]
        if any(shares):
            label = f"{low:,} to {high - 1:,}" if high > low + 1 else f"{low:,}"
            table.add_row(label, *(f"{share:.1%}" for share in shares))
    table.add_section()
    table.add_row("samples", *(f"{len(x):,}" for x in lengths))
    table.add_row("mean", *(f"{x.mean():,.1f}" for x in lengths))
    table.add_row("median", *(f"{np.median(x):,.0f}" for x in lengths))
    table.add_row("together", *(f"{x.sum(dtype=np.int64):,}" for x in lengths))
    table.caption = (
        f"Wasserstein distance {wasserstein(*lengths):.2f} tokens, Kolmogorov-Smirnov "
        f"{kolmogorov_smirnov(*lengths):.3f}"
    )
    return table
