"""What seeds and documents say about a difference: error, interval, tests, detectable effects.

A score varies for two reasons: other documents could have been asked (document noise), and another
order of the same training data gives another model (seed noise). Both count here, for a claim about
a recipe; with one seed only the first can be seen, and the claim is about two checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mmalign.evaluation.statistics import group_sums

POWER = 0.8  # of the smallest detectable difference
ALPHA = 0.05


@dataclass(frozen=True)
class Part:
    """A term of an estimate: paired differences on one set of documents.

    Parts are independent in their documents and share the seeds.
    """

    values: np.ndarray  # (num_seeds, num_documents) float64
    clusters: np.ndarray  # (num_documents,) int; documents of one cluster are not independent
    weight: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Weighted sum of the means of parts, with its error from both sources."""

    value: float
    by_seed: np.ndarray  # (num_seeds,)
    seed_error: float | None  # standard error from seed noise; None with one seed
    document_error: float
    degrees_of_freedom: float

    @property
    def standard_error(self) -> float:
        return math.hypot(self.seed_error or 0.0, self.document_error)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        half = self._quantile((1 + confidence) / 2) * self.standard_error
        return self.value - half, self.value + half

    def p_difference(self) -> float:
        """Two-sided p of no difference."""
        return float(2 * self._tail(abs(self.value)))

    def p_seeds(self) -> float | None:
        """Two-sided p of a t test over seeds alone: of these documents, not of others like them."""
        if self.seed_error is None:
            return None
        if self.seed_error == 0:
            return float(self.value == 0)
        distance = abs(self.value) / self.seed_error
        return float(2 * stats.t.sf(distance, len(self.by_seed) - 1))

    def p_equivalence(self, margin: float) -> float:
        """p of a difference of at least `margin`: two one-sided tests (Schuirmann 1987)."""
        return float(max(self._tail(margin - self.value), self._tail(margin + self.value)))

    def p_beyond(self, margin: float) -> float:
        """p of a difference of at most `margin`, to either side."""
        return min(1.0, float(2 * self._tail(abs(self.value) - margin)))

    def smallest_detectable(self, alpha: float = ALPHA) -> float:
        """The difference that a two-sided test at `alpha` would find in POWER of all studies."""
        return (self._quantile(1 - alpha / 2) + self._quantile(POWER)) * self.standard_error

    def _quantile(self, probability: float) -> float:
        return float(stats.t.ppf(probability, self.degrees_of_freedom))

    def _tail(self, distance: float) -> float:
        """P(T > distance / error)."""
        if self.standard_error == 0:  # the same answers throughout
            return 0.5 if distance == 0 else float(distance < 0)
        return float(stats.t.sf(distance / self.standard_error, self.degrees_of_freedom))


def estimate(parts: Sequence[Part]) -> Estimate:
    """Both errors add in quadrature; their degrees of freedom as of Welch and Satterthwaite (1946).

    The seed error is that of the means by seed, the document error that of the means by document
    (whole clusters; Cameron, Gelbach and Miller 2011 without their subtraction). Each includes the
    noise of single answers once, so the sum errs on the safe side by it. Of simulated studies of
    pure noise, a test at 5% found something in 1 to 8% with three seeds, in up to 13% with two.
    """
    by_seed = np.sum([part.weight * part.values.mean(axis=1) for part in parts], axis=0)
    num_seeds = len(by_seed)
    terms = []  # (variance, degrees of freedom)
    for part in parts:
        variance, num_clusters = _document_variance(part)
        terms.append((part.weight**2 * variance, num_clusters - 1))
    document_variance = sum(variance for variance, _ in terms)
    seed_variance = float(np.var(by_seed, ddof=1)) / num_seeds if num_seeds > 1 else None
    if seed_variance is not None:
        terms.append((seed_variance, num_seeds - 1))
    return Estimate(
        value=float(by_seed.mean()),
        by_seed=by_seed,
        seed_error=None if seed_variance is None else math.sqrt(seed_variance),
        document_error=math.sqrt(document_variance),
        degrees_of_freedom=_satterthwaite(terms),
    )


def _document_variance(part: Part) -> tuple[float, int]:
    """Variance of the mean over documents drawn by cluster, and the number of clusters."""
    values = part.values.mean(axis=0)  # (num_documents,)
    sums, sizes = group_sums(values, part.clusters)
    if len(sums) < 2:
        raise ValueError("an estimate needs documents of at least two clusters")
    residuals = sums - values.mean() * sizes
    scale = len(sums) / (len(sums) - 1) / len(values) ** 2
    return float(scale * residuals @ residuals), len(sums)


def _satterthwaite(terms: Sequence[tuple[float, float]]) -> float:
    total = sum(variance for variance, _ in terms)
    if total == 0:
        return max(freedom for _, freedom in terms)
    return total**2 / sum(variance**2 / freedom for variance, freedom in terms)


def crossed_bootstrap(
    parts: Sequence[Part], seed: int = 0, num_resamples: int = 2000
) -> np.ndarray:
    """(num_resamples,) estimates, with seeds and, apart from them, whole clusters drawn anew.

    Shows the shape of the distribution. With few seeds it is too narrow, by (num_seeds - 1) /
    num_seeds of the seed variance, so intervals and tests come from `estimate`.
    """
    random, num_seeds = np.random.default_rng(seed), len(parts[0].values)
    drawn_seeds = random.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_resamples)
    draws = np.zeros(num_resamples)
    for part in parts:
        tables = [group_sums(values, part.clusters) for values in part.values]
        sums, sizes = np.stack([sums for sums, _ in tables]), tables[0][1]
        clusters = random.multinomial(
            len(sizes), np.full(len(sizes), 1 / len(sizes)), num_resamples
        )
        totals = (drawn_seeds @ sums * clusters).sum(axis=1) / num_seeds
        draws += part.weight * totals / (clusters @ sizes)
    return draws


def smallest_detectable_share(num_documents: int, discordant: float) -> float:
    """What a paired comparison of right and wrong answers can find, before anything has run.

    discordant: share of the documents that only one of the two models gets right. Two checkpoints,
    independent documents, a two-sided test at ALPHA, found in POWER of all studies.
    """
    z = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)
    return float(z * math.sqrt(discordant / num_documents))
