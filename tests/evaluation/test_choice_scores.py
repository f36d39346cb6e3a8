"""Scores of choices against SciPy and by hand."""

import numpy as np
import pytest
from scipy import optimize, special, stats

from mmalign.evaluation.choice_scores import at_entropy_of, fit_temperature, mean_entropy


def items(rows: list[list[float]]) -> list[dict]:
    return [{"choices": [{"loglikelihood": x} for x in row]} for row in rows]


def draw(seed: int, scale: float = 3.0) -> np.ndarray:
    """(30, 6) log-likelihoods; -inf where a document has fewer choices."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(-20, scale, (30, 6))
    for row in scores:
        row[rng.integers(2, 7) :] = -np.inf
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_mean_entropy_is_scipys(seed):
    scores = draw(seed)
    expected = stats.entropy(special.softmax(scores, axis=1), axis=1).mean()
    assert mean_entropy(scores) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_is_the_root(seed):
    scores, wanted = draw(seed, 8.0), mean_entropy(draw(seed + 10, 1.0))
    root = optimize.brentq(lambda t: mean_entropy(scores / t) - wanted, 1e-3, 1e3, xtol=1e-12)
    assert fit_temperature(scores, wanted) == pytest.approx(root, rel=1e-9)


def test_a_model_that_is_only_sharper_is_given_back_as_the_base():
    rows = [row[np.isfinite(row)].tolist() for row in draw(0)]
    sharper = [[4 * x for x in row] for row in rows]
    matched = at_entropy_of(items(sharper), items(rows))
    for found, expected in zip(matched, rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_the_base_itself_stays_to_the_bit():
    rows = [row[np.isfinite(row)].tolist() for row in draw(0)]
    assert [x.tolist() for x in at_entropy_of(items(rows), items(rows))] == rows


def test_extreme_scores_have_a_finite_temperature():
    scores = np.array([[-1e4, -1.0, -2e4], [-3.0, -3.0, -np.inf]])
    assert np.isfinite(fit_temperature(scores, 0.9))
    assert np.isfinite(fit_temperature(scores, 0.0))
