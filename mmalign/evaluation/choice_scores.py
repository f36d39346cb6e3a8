"""Other scores of TruthfulQA's choices, from the same log-likelihoods: they resist artefacts.

Every function takes items of one task, in order, and gives one number per document.
"""

from collections.abc import Sequence

import numpy as np

_MOST_LOG_TEMPERATURE = 30.0  # exp(30): flat to rounding


def loglikelihoods(items: Sequence[dict], key: str = "loglikelihood") -> list[np.ndarray]:
    """Of the choices of each document: (num_choices,) each."""
    return [np.array([choice[key] for choice in item["choices"]]) for item in items]


def per_token(items: Sequence[dict]) -> list[np.ndarray]:
    """The mean log-probability of a token of each choice."""
    lengths = loglikelihoods(items, "num_tokens")
    return [sums / n for sums, n in zip(loglikelihoods(items), lengths, strict=True)]


def has_answers_only(items: Sequence[dict]) -> bool:
    """Whether the choices were also scored without their question."""
    return all("answer_only_loglikelihood" in x for item in items for x in item["choices"])


def at_entropy_of(items: Sequence[dict], base_items: Sequence[dict]) -> list[np.ndarray]:
    """Log-likelihoods divided by the one temperature that gives them the base model's sharpness.

    Sharpness is the mean entropy of the distribution over a document's choices.
    """
    own, wanted = _matrix(items), mean_entropy(_matrix(base_items))
    temperature = 1.0 if mean_entropy(own) == wanted else fit_temperature(own, wanted)
    return [scores / temperature for scores in loglikelihoods(items)]


def fit_temperature(scores: np.ndarray, entropy: float) -> float:
    """The temperature at which softmax(scores / temperature) has this mean entropy.

    scores: (num_documents, num_choices), -inf where a document has fewer choices. Bisection of the
    logarithm: the entropy rises with the temperature.
    """
    low, high = -_MOST_LOG_TEMPERATURE, _MOST_LOG_TEMPERATURE
    for _ in range(64):
        middle = (low + high) / 2
        if mean_entropy(scores / np.exp(middle)) < entropy:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def mean_entropy(scores: np.ndarray) -> float:
    """In nats, of softmax over the rows of (num_documents, num_choices); -inf: no choice."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    expected = (weights * np.where(weights > 0, shifted, 0)).sum(axis=1) / total
    return float(np.mean(np.log(total) - expected))


def _matrix(items: Sequence[dict]) -> np.ndarray:
    rows = loglikelihoods(items)
    matrix = np.full((len(rows), max(map(len, rows))), -np.inf)
    for row, scores in zip(matrix, rows, strict=True):
        row[: len(scores)] = scores
    return matrix
