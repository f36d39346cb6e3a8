"""Intervals and tests against scipy."""

import numpy as np
import pytest
from scipy import stats

from mmalign.evaluation.statistics import (
    bootstrap_means,
    effective_n,
    holm,
    mcnemar_p,
    mean_of_tasks_interval,
    percentile_interval,
    wilson_interval,
)


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 12), (2300, 4975)])
def test_wilson(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 8, 817])
def test_wilson_contains_its_mean(n):
    assert wilson_interval(0.0, n)[0] == 0 and wilson_interval(1.0, n)[1] == 1


@pytest.mark.parametrize("digits", [0, 6], ids=["right or wrong", "shares"])
def test_bootstrap_of_single_documents(digits):
    """Two ways to draw: few kinds of documents, or all different."""
    values = np.random.default_rng(1).random(300).round(digits)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = percentile_interval(bootstrap_means(values, range(300)))
    # two Monte Carlo estimates of one quantile: their own error is about 4% of the width
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.1 * width and abs(high - expected.high) < 0.1 * width


def test_equally_good_models_are_seldom_told_apart():
    draw, found, significant = np.random.default_rng(3), 0, 0
    for _ in range(200):
        difference = np.subtract(*(draw.random((2, 100)) < 0.7).astype(float))
        low, high = percentile_interval(bootstrap_means(difference, range(100)))
        found += low > 0 or high < 0
        significant += mcnemar_p(int((difference < 0).sum()), int((difference > 0).sum())) < 0.05
    # each at most 1 in 20 by design; binomial with n = 200: more than 20 has probability 0.1%
    assert found <= 20 and significant <= 20


def test_bootstrap_draws_whole_groups():
    values = [1.0, 1.0, 0.0, 0.0]
    assert set(bootstrap_means(values, [0, 0, 1, 1])) == {0.0, 0.5, 1.0}
    assert len(set(bootstrap_means(values, range(4)))) == 5


def test_effective_n_of_groups():
    independent = np.random.default_rng(0).random(4000) < 0.6
    groups = np.arange(4000) // 4
    copied = np.repeat(independent[:1000], 4).astype(float)  # each group is one answer four times
    assert effective_n(copied, groups) == pytest.approx(1000, rel=0.01)
    assert effective_n(independent.astype(float), groups) == pytest.approx(4000, rel=0.1)
    assert effective_n([1.0] * 8, groups[:8]) == 2  # all right: it could be one answer a group


def test_interval_of_a_mean_of_tasks():
    """Equal symmetric intervals shrink with the square root of their number."""
    low, high = mean_of_tasks_interval([0.5] * 4, [(0.4, 0.6)] * 4)
    assert (low, high) == pytest.approx((0.45, 0.55))


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (5, 17), (120, 90), (1500, 1600)])
def test_mcnemar(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_equals_statsmodels():
    """statsmodels 0.15.0: mcnemar([[10, b], [c, 20]], exact=True).pvalue"""
    assert mcnemar_p(5, 17) == pytest.approx(0.01690053939819336, rel=1e-12)
    assert mcnemar_p(120, 90) == pytest.approx(0.045114087864840696, rel=1e-12)
    assert mcnemar_p(1500, 1600) == pytest.approx(0.07537169707532781, rel=1e-12)


def test_holm_equals_statsmodels():
    """statsmodels 0.15.0: multipletests(p, method="holm")[1]"""
    corrected = holm([0.01, 0.04, 0.03, 0.005, 0.2, 0.04])
    assert corrected == pytest.approx([0.05, 0.12, 0.12, 0.03, 0.2, 0.12])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
