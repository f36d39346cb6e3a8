"""Requests of TruthfulQA and ETHICS for machines without the real files.

Numbers stand for tokens. Documents, choices, lengths and what they share are those of the real sets
under LLaMA's tokenizer (means; a spread where it matters), so scoring computes about as many
tokens: 58,983 for TruthfulQA's two tasks and 1,229,878 for ETHICS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Request = tuple[str, str]

PRESET_TOKENS, QUESTIONS = 183, 817  # TruthfulQA: questions after the preset
QUESTION_TOKENS, CHOICES = (11, 23), (4, 10)  # of the document and of the question; uniform
SINGLE_TRUE_CHOICES = 5  # mc1's are among mc2's
OPENING_TOKENS, CHOICE_TOKENS = 3, (2, 15)  # shared by a question's choices, and a choice's own


@dataclass(frozen=True)
class Subset:
    documents: int
    group: int  # consecutive documents about one scenario
    shared: int  # tokens that a group shares
    own: tuple[int, ...]  # tokens of a document: quantiles at equal distances
    answers: tuple[int, ...] = (1, 1)  # tokens of the two continuations


ETHICS = {
    "commonsense": Subset(3885, 1, 0, (14, 20, 23, 27, 31, 40, 250, 420, 590, 890)),
    "deontology": Subset(3596, 4, 37, (4, 8), (1, 3)),
    "justice": Subset(2704, 4, 39, (3, 7), (1, 3)),
    "utilitarianism": Subset(4808, 2, 31, (20, 44)),
    "virtue": Subset(4975, 5, 35, (4, 8)),
}


class NumberTokenizer:
    """Reads "17 5" as the tokens 17 and 5."""

    eos_token_id = 2

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


class _Writer:
    def __init__(self, vocab_size: int):
        self.rng, self.vocab_size = np.random.default_rng(0), vocab_size

    def words(self, count: int) -> str:
        return "".join(f" {token}" for token in self.rng.integers(3, self.vocab_size, count))

    def between(self, bounds: Sequence[int]) -> int:
        """Uniform between the quantiles."""
        at = self.rng.uniform(0, len(bounds) - 1)
        return round(float(np.interp(at, range(len(bounds)), bounds)))


def truthfulqa(vocab_size: int) -> list[Request]:
    writer = _Writer(vocab_size)
    preset, requests = writer.words(PRESET_TOKENS), []
    for _ in range(QUESTIONS):
        context = preset + writer.words(writer.between(QUESTION_TOKENS))
        opening = writer.words(OPENING_TOKENS)
        choices = [
            opening + writer.words(writer.between(CHOICE_TOKENS))
            for _ in range(writer.between(CHOICES))
        ]
        requests += [(context, choice) for choice in choices[:SINGLE_TRUE_CHOICES] + choices]
    return requests


def ethics(vocab_size: int) -> list[Request]:
    writer, requests = _Writer(vocab_size), []
    for subset in ETHICS.values():
        answers = [writer.words(count) for count in subset.answers]
        for index in range(subset.documents):
            if index % subset.group == 0:
                scenario = writer.words(subset.shared)
            context = scenario + writer.words(writer.between(subset.own))
            requests += [(context, answer) for answer in answers]
    return requests
