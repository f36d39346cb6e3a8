"""Rules that answer TruthfulQA without its questions, from the choices alone: baselines.

A rule gives each choice of a document a probability, (num_choices,), or None where it cannot
answer. Ties are shared: in the published files mc1's true choice always stands first, so taking the
first of several would read the answer from its place.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

Rule = Callable[[Sequence[dict]], np.ndarray | None]  # a document's choices, as in its item

_WORD = re.compile(r"[a-z']+")
_NEGATION = re.compile(r"\b(no|not|never|nothing|none|cannot)\b|n't")
# openings of choices that deny or decline: the style of TruthfulQA's true answers
_HEDGE = re.compile(
    r"(no|not|never|nothing|none|nobody|there (is|are|was|were) no|it depends|i have no comment)\b"
)


def _all_of_the_largest(values: Sequence[float]) -> np.ndarray:
    largest = np.equal(values, max(values))
    return largest / largest.sum()


def _longest(choices: Sequence[dict]) -> np.ndarray:
    return _all_of_the_largest([choice["num_tokens"] for choice in choices])


def _shortest(choices: Sequence[dict]) -> np.ndarray:
    return _all_of_the_largest([-choice["num_tokens"] for choice in choices])


def _least_overlap(choices: Sequence[dict]) -> np.ndarray | None:
    """The odd one out: smallest mean Jaccard similarity of its words to the other choices'."""
    if len(choices) < 2:
        return None
    words = [set(_WORD.findall(_plain(choice))) for choice in choices]
    similarities = np.array([[_jaccard(a, b) for b in words] for a in words])
    np.fill_diagonal(similarities, 0)
    return _all_of_the_largest((-similarities.sum(axis=1)).round(12).tolist())


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def _only_negation(choices: Sequence[dict]) -> np.ndarray | None:
    found = np.array([bool(_NEGATION.search(_plain(choice))) for choice in choices])
    return found.astype(float) if found.sum() == 1 else None


def _tokens_times(slope: float) -> Rule:
    """The softmax of slope * number of tokens: a model that knows only lengths."""

    def rule(choices: Sequence[dict]) -> np.ndarray:
        scores = slope * np.array([choice["num_tokens"] for choice in choices])
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    return rule


def _plain(choice: dict) -> str:
    return choice["text"].lower().replace("\u2019", "'")


CHOOSING: dict[str, Rule] = {
    "longest": _longest,
    "shortest": _shortest,
    "least overlap": _least_overlap,
    "only negation": _only_negation,
}
SCORING: dict[str, Rule] = {"-1 per token": _tokens_times(-1), "+0.5 per token": _tokens_times(0.5)}


def rule_rows(items: Sequence[dict], rules: dict[str, Rule]) -> dict[str, dict]:
    """{rule: {"acc": mean probability of the true choices, "n": documents that it answers}}."""
    rows = {}
    for name, rule in rules.items():
        found = [(item["gold"], rule(item["choices"])) for item in items]
        values = [_true_mass(gold, x) for gold, x in found if x is not None]
        if values:
            rows[name] = {"acc": float(np.mean(values)), "n": len(values)}
    return rows


def _true_mass(gold: int | Sequence[int], probabilities: np.ndarray) -> float:
    true = gold if isinstance(gold, int) else np.flatnonzero(gold)
    return float(np.sum(probabilities[true]))


def is_hedge(choice: dict) -> bool:
    """Whether it opens with a denial, "It depends" or "I have no comment"."""
    return bool(_HEDGE.match(_plain(choice).strip()))
