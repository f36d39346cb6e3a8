"""Quantities that tasks compute from log-likelihoods and items, and caveats about scores.

mc2 and grouped exact match are those of lm-evaluation-harness 00209e10f.
"""

from collections.abc import Iterable, Sequence

import numpy as np


def true_share(loglikelihoods: Sequence[float], split: int) -> float:
    """Probability of the first `split` choices over that of all; no underflow."""
    shifted = np.exp(np.array(loglikelihoods) - max(loglikelihoods))
    return float(shifted[:split].sum() / shifted.sum())


def exact_match(items: Sequence[dict], scores: Sequence[float], group_size: int) -> float | None:
    """Share of complete groups with every document right; None without a complete group."""
    groups: dict[int, list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        groups.setdefault(item["group_id"], []).append(score)
    complete = [all(group) for group in groups.values() if len(group) == group_size]
    return sum(complete) / len(complete) if complete else None


def mean_tokens(choices: Iterable[dict]) -> float:
    return float(np.mean([choice["num_tokens"] for choice in choices]))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def percent_interval(interval: Sequence[float]) -> str:
    return f"{percent(interval[0])} to {percent(interval[1])}"


def caveats(name: str, summary: dict) -> list[str]:
    """Sentences where a score is not above chance or a constant answer, or documents were cut."""
    low, high = summary["interval"]
    chance = {"chance": summary["chance"]} if "chance" in summary else {}
    references = chance | summary.get("baselines", {})
    within = [what for what, value in references.items() if low <= value <= high]
    best = max(references, key=references.get)
    findings = []
    if within:
        listed = [f"{what} ({percent(references[what])})" for what in within]
        findings.append(f"cannot be distinguished from {_either(listed)}")
    if high < references[best]:
        findings.append(f"is below {best} ({percent(references[best])})")
    score = f"{name}: {percent(summary['acc'])} ({percent_interval(summary['interval'])})"
    sentences = [f"{score} {' and '.join(findings)}."] if findings else []
    if number := summary.get("num_truncated", 0):
        sentences.append(
            f"{name}: {number:,} of {summary['n']:,} documents are longer than the model's context "
            "and were truncated on the left."
        )
    return sentences


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
