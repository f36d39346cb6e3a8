"""Distances against SciPy, draws against an optimal assignment."""

import numpy as np
import pytest
from scipy import optimize, stats

from mmalign.data.lengths import draw_lengths, histogram_rows, kolmogorov_smirnov, wasserstein


@pytest.mark.parametrize("seed", range(5))
def test_distances_equal_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.poisson(rng.integers(1, 50), size=rng.integers(1, 300)) for _ in range(2))
    assert wasserstein(a, b) == pytest.approx(stats.wasserstein_distance(a, b))
    assert kolmogorov_smirnov(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic)


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_almost_an_optimal_assignment(seed):
    rng = np.random.default_rng(seed)
    wanted, available = rng.geometric(0.02, 60), rng.geometric(0.03, 90)
    drawn = draw_lengths(wanted, available, np.random.RandomState(seed))
    assert len(set(drawn)) == 60
    cost = np.abs(wanted[:, None] - available)
    best = cost[optimize.linear_sum_assignment(cost)].sum()
    assert cost[np.arange(60), drawn].sum() <= 1.5 * best


def test_draws_repeat_no_more_than_necessary():
    wanted, available = np.arange(1, 101), np.arange(1, 41)
    drawn = draw_lengths(wanted, available, np.random.RandomState(0))
    assert np.bincount(drawn).max() == 3


def test_histogram_counts_every_sample_once():
    rows = histogram_rows((np.array([1, 2, 3, 900]), np.array([4, 7, 900])))
    assert rows == [
        ("1", "25.0%", "0.0%"),
        ("2 to 3", "50.0%", "0.0%"),
        ("4 to 7", "0.0%", "66.7%"),
        ("512 to 1,023", "25.0%", "33.3%"),
    ]
