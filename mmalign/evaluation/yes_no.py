"""Answers to yes/no questions: parsers and scores of POPE and MME, as published and stricter.

POPE: github.com/RUCAIBox/POPE (3df3ba1), evaluate.py. Its parser takes everything that does not
hold the word no for a yes ("NO", "I don't know", an empty answer); parse_yes_no takes the first
word yes or no, and leaves what has neither unparsed. MME: mme_metric.py of Sight-Beyond-Text
(47f96a3), which is the benchmark's own.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

YesNo = Literal["yes", "no"]
_FIRST = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def parse_yes_no(text: str) -> YesNo | None:
    """The first word yes or no, in any case; None where there is neither."""
    found = _FIRST.search(text)
    return None if found is None else "yes" if found[1].lower() == "yes" else "no"


def parse_pope(text: str) -> YesNo:
    """The official parser: no where the first sentence has the word No, no or not, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_mme(text: str) -> YesNo | None:
    """The official parser: yes or no within the first four characters."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def yes_no_scores(labels: Sequence[YesNo], answers: Sequence[YesNo | None]) -> dict[str, float]:
    """{"accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed": their number}.

    Shares from 0 to 1, of which yes is the positive class; a ratio without cases is 0. Unparsed
    answers are wrong, count as missed where the label is yes, and are left out of yes_ratio.
    """
    pairs = list(zip(labels, answers, strict=True))
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    answered_yes, num_parsed = true_yes + false_yes, len(pairs) - answers.count(None)
    precision, recall = _ratio(true_yes, answered_yes), _ratio(true_yes, labels.count("yes"))
    return {
        "accuracy": _ratio(true_yes + pairs.count(("no", "no")), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(answered_yes, num_parsed),
        "unparsed": len(pairs) - num_parsed,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def auroc(labels: Sequence[YesNo], log_odds: Sequence[float]) -> float | None:
    """Probability that a yes question has larger log-odds than a no question; ties count half.

    None without questions of both kinds.
    """
    yes = np.array([x for x, label in zip(log_odds, labels, strict=True) if label == "yes"])
    no = np.sort([x for x, label in zip(log_odds, labels, strict=True) if label == "no"])
    if not len(yes) or not len(no):
        return None
    below, not_above = (np.searchsorted(no, yes, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(no)))


# ---- MME ----


PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
NOT_SCORED_AS_RELEASED = ("landmark", "artwork")  # by Sight-Beyond-Text's script


def mme_scores(images: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """{"acc", "acc_plus": images with both questions right, "score": 100 of each} of a subtask."""
    pairs: dict[str, list[bool]] = {}
    for image, is_right in zip(images, right, strict=True):
        pairs.setdefault(image, []).append(is_right)
    acc = sum(map(sum, pairs.values())) / len(right)
    acc_plus = sum(map(all, pairs.values())) / len(pairs)
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}


def mme_totals(scores: dict[str, float], left_out: Iterable[str] = ()) -> dict[str, float]:
    """{"perception", "cognition": sums of the subtasks' scores}, without `left_out`."""
    skipped = set(left_out)
    return {
        name: sum(scores[x] for x in subtasks if x in scores and x not in skipped)
        for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
