"""Against scikit-learn, SciPy and brute force."""

import numpy as np
import pytest
from sklearn import metrics

from mmalign.evaluation.yes_no_scores import (
    auroc_values,
    balanced_values,
    best_threshold,
    group_values,
    ranked_values,
    shifted_values,
)

SEEDS = range(5)


def draw(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds with ties, and right answers that they say something about."""
    rng = np.random.default_rng(seed)
    is_yes = rng.random(n) < 0.3
    return (rng.normal(is_yes + 1.0, 1.5)).round(1), is_yes


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_of_auroc_values_is_the_area(seed):
    log_odds, is_yes = draw(seed)
    values = auroc_values(log_odds, is_yes)
    assert values.mean() == pytest.approx(metrics.roc_auc_score(is_yes, log_odds))


@pytest.mark.parametrize("seed", SEEDS)
def test_variance_of_auroc_values_is_delongs(seed):
    """Var = S10 / m + S01 / n (DeLong et al. 1988), from all pairs."""
    log_odds, is_yes = draw(seed, 400)
    yes, no = log_odds[is_yes], log_odds[~is_yes]
    wins = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)  # (num_yes, num_no)
    delong = wins.mean(1).var(ddof=1) / len(yes) + wins.mean(0).var(ddof=1) / len(no)
    values = auroc_values(log_odds, is_yes)
    assert values.var() / len(values) == pytest.approx(delong, rel=0.02)


def test_interval_of_auroc_values_covers_the_true_area():
    """Samples of a known area: 95% intervals of the mean of the values cover it."""
    rng, covered = np.random.default_rng(0), 0
    area = 0.7602499  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for _ in range(400):
        is_yes = np.arange(150) < 50
        values = auroc_values(rng.normal(is_yes.astype(float)), is_yes)
        covered += abs(values.mean() - area) < 1.96 * values.std(ddof=1) / np.sqrt(150)
    assert 0.92 <= covered / 400 <= 0.98


def test_a_constant_bias_changes_no_auroc_and_no_shifted_accuracy():
    log_odds, is_yes = draw(0)
    clusters = range(len(log_odds))
    for score in (auroc_values, lambda x, y: shifted_values(x, y, clusters)):
        assert score(log_odds + 8, is_yes).tolist() == pytest.approx(
            score(log_odds, is_yes).tolist()
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_of_balanced_values_is_balanced_accuracy(seed):
    log_odds, is_yes = draw(seed)
    right = ((log_odds > 0) == is_yes).astype(float)
    values = balanced_values(right, is_yes)
    expected = metrics.balanced_accuracy_score(is_yes, log_odds > 0)
    assert values.mean() == pytest.approx(expected)
    recalls = [right[is_yes == x].mean() for x in (True, False)]
    sizes = [(is_yes == x).sum() for x in (True, False)]
    variance = sum(p * (1 - p) / n for p, n in zip(recalls, sizes, strict=True)) / 4
    assert values.var() / len(values) == pytest.approx(variance)


def test_one_right_answer_has_neither():
    is_yes = np.ones(5, bool)
    assert auroc_values(np.arange(5.0), is_yes) is None
    assert balanced_values(np.ones(5), ~is_yes) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_best_threshold_is_the_smallest_best_shift(seed):
    log_odds, is_yes = draw(seed, 30)
    found = best_threshold(log_odds, is_yes)

    def accuracy(threshold: float) -> float:
        return np.mean((log_odds > threshold) == is_yes)

    grid = np.arange(-10, 10, 0.05) + 0.025  # between all values, which have one decimal
    assert accuracy(found) == max(map(accuracy, (0.0, *grid)))
    values = sorted(set(log_odds.tolist()))
    middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    candidates = (0.0, values[0] - 1, *middles, values[-1] + 1)
    assert abs(found) == min(abs(x) for x in candidates if accuracy(x) == accuracy(found))


def test_shifted_values_use_the_other_half_only():
    """In each half the threshold is that of the other, so a document's own answer is not fitted."""
    log_odds, is_yes = draw(1)
    clusters = np.arange(len(log_odds)) // 4
    values = shifted_values(log_odds, is_yes, clusters)
    changed = is_yes.copy()
    changed[clusters == 7] = ~changed[clusters == 7]
    after = shifted_values(log_odds, changed, clusters)
    # all of group 7 are in one half, with a threshold that they do not influence
    assert (after[clusters == 7] == 1 - values[clusters == 7]).all()


def test_shifted_values_of_random_answers_are_at_chance():
    """A threshold that was fitted on the same documents would be above it."""
    rng, means = np.random.default_rng(0), []
    for _ in range(200):
        log_odds, is_yes = rng.normal(size=60), rng.random(60) < 0.5
        means.append(shifted_values(log_odds, is_yes, range(60)).mean())
    assert abs(np.mean(means) - 0.5) < 0.02


def test_halves_need_documents_on_both_sides():
    assert shifted_values(np.zeros(3), np.ones(3, bool), [5, 5, 5]) is None


def test_groups():
    right = np.array([1, 1, 1, 0, 1, 1, 1])
    groups = [0, 0, 1, 1, 2, 2, 3]
    assert group_values(right, groups, 2)[:6].tolist() == [1, 1, 0, 0, 1, 1]
    assert np.isnan(group_values(right, groups, 2)[6])
    assert group_values(right, range(7), 2) is None


def test_ranked_compares_within_complete_groups_of_one_yes():
    log_odds = np.array([-5.0, -9, -6, -7, -3, -3, 0, 1, 9])
    is_yes = np.array([1, 0, 0, 1, 1, 0, 1, 1, 1], bool)
    values = ranked_values(log_odds, is_yes, [0, 0, 1, 1, 2, 2, 3, 3, 4], 2)
    assert values[:6].tolist() == [1, 1, 0, 0, 0, 0]  # -3 and -3: a tie
    assert np.isnan(values[6:]).all()  # two yeses; incomplete
