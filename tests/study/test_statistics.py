"""Synthetic scores: a known effect, none, seed noise alone, document noise alone, clusters."""

import numpy as np
import pytest
from scipy import stats

from mmalign.study.statistics import (
    Estimate,
    Part,
    crossed_bootstrap,
    estimate,
    smallest_detectable_share,
)


def noise(
    random: np.random.Generator,
    num_seeds: int,
    num_documents: int,
    seed_sd: float = 0.0,
    document_sd: float = 0.0,
    answer_sd: float = 0.0,
) -> np.ndarray:
    """(num_seeds, num_documents) differences of mean 0."""
    seeds = seed_sd * random.standard_normal((num_seeds, 1))
    documents = document_sd * random.standard_normal((1, num_documents))
    return seeds + documents + answer_sd * random.standard_normal((num_seeds, num_documents))


def of(values: np.ndarray, clusters: np.ndarray | None = None, weight: float = 1.0) -> Estimate:
    return estimate(
        [Part(values, np.arange(values.shape[1]) if clusters is None else clusters, weight)]
    )


def test_seed_noise_alone_gives_the_t_test_over_seeds():
    values = noise(np.random.default_rng(1), 4, 60, seed_sd=0.05) + 0.02
    expected = stats.ttest_1samp(values.mean(axis=1), 0.0)
    found = of(values)
    assert found.p_difference() == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.p_seeds() == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval()
    assert found.interval() == pytest.approx((low, high), rel=1e-6)


def test_document_noise_of_one_seed_gives_the_t_test_over_documents():
    values = noise(np.random.default_rng(2), 1, 60, document_sd=0.3) + 0.1
    expected = stats.ttest_1samp(values[0], 0.0)
    found = of(values)
    assert found.p_difference() == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.seed_error is None and found.p_seeds() is None


def test_more_seeds_do_not_hide_that_documents_are_few():
    values = np.repeat(noise(np.random.default_rng(3), 1, 20, document_sd=0.3), 50, axis=0)
    assert of(values).standard_error == pytest.approx(of(values[:1]).standard_error)


def test_documents_asked_twice_count_once():
    values = noise(np.random.default_rng(4), 3, 40, document_sd=0.2, answer_sd=0.2)
    once, twice = of(values), of(np.repeat(values, 5, axis=1), np.repeat(np.arange(40), 5))
    assert twice.document_error == pytest.approx(once.document_error)
    assert twice.degrees_of_freedom == pytest.approx(once.degrees_of_freedom)
    assert of(np.repeat(values, 5, axis=1)).document_error < 0.5 * once.document_error


def test_parts_add_like_independent_samples():
    random = np.random.default_rng(5)
    a, b = (noise(random, 1, n, document_sd=0.2) for n in (50, 80))
    found = estimate([Part(a, np.arange(50)), Part(b, np.arange(80), -1.0)])
    expected = stats.ttest_ind(a[0], b[0], equal_var=False)  # Welch
    assert found.p_difference() == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(expected.df)


@pytest.mark.parametrize("margin", [0.01, 0.05])
def test_equivalence_is_two_one_sided_tests(margin):
    values = noise(np.random.default_rng(6), 5, 50, seed_sd=0.02) + 0.01
    means = values.mean(axis=1)
    below = stats.ttest_1samp(means, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(means, margin, alternative="less").pvalue
    assert of(values).p_equivalence(margin) == pytest.approx(max(below, above), rel=1e-6)


def test_difference_beyond_a_margin():
    values = noise(np.random.default_rng(7), 5, 50, seed_sd=0.01) + 0.1
    assert of(values).p_beyond(0.02) < 0.01
    assert of(values).p_beyond(0.2) == 1.0
    assert of(values).p_equivalence(0.02) > 0.99


def test_equal_scores_have_no_error_and_no_effect():
    found = of(np.zeros((3, 10)))
    assert found.interval() == (0.0, 0.0)
    assert found.p_difference() == 1.0 and found.p_equivalence(0.01) == 0.0
    assert of(np.full((3, 10), 0.5)).p_difference() == 0.0


def test_crossed_bootstrap_has_the_error_of_the_estimate():
    random = np.random.default_rng(8)
    clusters = np.arange(200) // 2
    values = noise(random, 40, 200, seed_sd=0.05, document_sd=0.3, answer_sd=0.3)
    parts = [Part(values, clusters), Part(noise(random, 40, 90, 0.02, 0.2), np.arange(90), -0.5)]
    draws, found = crossed_bootstrap(parts), estimate(parts)
    assert draws.mean() == pytest.approx(found.value, abs=0.1 * found.standard_error)
    # the estimate counts the noise of single answers twice: at most this much wider
    assert 0.9 * draws.std() < found.standard_error < 1.15 * draws.std()


@pytest.mark.parametrize(
    "sources",
    [
        dict(document_sd=0.2, answer_sd=0.3),
        dict(seed_sd=0.02, document_sd=0.2, answer_sd=0.3),
        dict(seed_sd=0.05, document_sd=0.2, answer_sd=0.3),
        dict(seed_sd=0.05),
    ],
    ids=["documents", "mostly documents", "mostly seeds", "seeds"],
)
def test_noise_is_rarely_called_an_effect_and_a_detectable_effect_usually_is(sources):
    random, studies = np.random.default_rng(9), 300
    null = [of(noise(random, 3, 100, **sources)) for _ in range(studies)]
    false_positives = sum(found.p_difference() < 0.05 for found in null) / studies
    assert false_positives <= 0.09
    wide = of(noise(random, 2000, 100, **sources))
    error = (wide.by_seed.var(ddof=1) / 3 + wide.document_error**2) ** 0.5
    effect = [of(noise(random, 3, 100, **sources) + 8 * error) for _ in range(studies)]
    assert sum(found.p_difference() < 0.05 and found.value > 0 for found in effect) > 0.9 * studies


def test_smallest_detectable_difference_is_found_four_times_of_five():
    random = np.random.default_rng(10)
    pilots = [of(noise(random, 20, 100, 0.02, 0.2, 0.1)) for _ in range(50)]
    planned = float(np.mean([pilot.smallest_detectable() for pilot in pilots]))
    found = [of(noise(random, 20, 100, 0.02, 0.2, 0.1) + planned) for _ in range(400)]
    assert 0.7 < sum(x.p_difference() < 0.05 for x in found) / 400 < 0.9


@pytest.mark.parametrize(("discordant", "points"), [(0.1, 3.1), (0.2, 4.4), (0.3, 5.4)])
def test_smallest_detectable_difference_of_truthfulqa(discordant, points):
    assert 100 * smallest_detectable_share(817, discordant) == pytest.approx(points, abs=0.05)


def test_one_cluster_is_refused():
    with pytest.raises(ValueError, match="two clusters"):
        of(np.zeros((3, 4)), np.zeros(4, int))
