"""Documents to score: real or the toy world's; and synthetic requests as long as the real sets'.

MMALIGN_SHARED_DATA names the folder of the real files: truthfulqa/, ethics/, llama_tokenizer/.
"""

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mmalign.evaluation.requests import Request, TextEncoder
from mmalign.evaluation.tasks import load_documents, resolve_tasks
from mmalign.evaluation.tasks.multiple_choice import Document
from mmalign.tokenizer import Tokenizer
from mmalign.toy_world.corpus import corpus_pages, write_evaluation
from mmalign.toy_world.models import train_tokenizer

REAL = Path(os.environ.get("MMALIGN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def is_real() -> bool:
    return (REAL / "truthfulqa").is_dir() and (REAL / "llama_tokenizer").is_dir()


@cache
def _toy_folder() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory(prefix="mmalign-documents-")
    write_evaluation(Path(made.name), seed=0, num_documents=1000)
    train_tokenizer(corpus_pages(100, passages=12, seed=0), 900, Path(made.name, "tokenizer.model"))
    return made


def tokenizer_model() -> Path:
    """sentencepiece's model: LLaMA's, or one of 900 pieces trained on the toy world's texts."""
    if is_real():
        return REAL / "llama_tokenizer" / "tokenizer.model"
    return Path(_toy_folder().name, "tokenizer.model")


def documents(tasks: Sequence[str], limit: int) -> list[Document]:
    """About `limit` documents of each task (or of each task of a group, as `ethics`)."""
    root = REAL if is_real() else Path(_toy_folder().name)
    found = load_documents(resolve_tasks(tasks), root, None)
    return [document for rows in found.values() for document in spread(rows, limit)]


def source(limit: int | None) -> str:
    """Where requests come from, as a name begins."""
    return "" if is_real() else "toy world's " if limit else "synthetic "


def tokenizer(limit: int | None) -> TextEncoder:
    """Of `requests` with this limit."""
    if limit or is_real():
        return Tokenizer.from_pretrained(tokenizer_model())
    return NumberTokenizer()


def requests(task: str, limit: int | None, vocab_size: int) -> list[Request]:
    """Of about `limit` documents of each task; without a limit of all, or as many synthetic ones.

    The toy world has no documents as long as the real ones, so it does not stand in for all.
    """
    if limit or is_real():
        found = documents((task,), limit or sys.maxsize)
        return [request for document in found for request in document.requests]
    return {"truthfulqa": synthetic_truthfulqa, "ethics": synthetic_ethics}[task](vocab_size)


def spread(rows: Sequence[Document], limit: int) -> list[Document]:
    """At least `limit` documents, at equal distances: a file may begin with its short ones.

    Those about one scenario stay together, as they share a prefix.
    """
    groups: dict[tuple[str, int], list[Document]] = {}
    for row in rows:
        key = ("alone", row.doc_id) if row.group_id is None else ("group", row.group_id)
        groups.setdefault(key, []).append(row)
    mean = len(rows) / len(groups)
    wanted = min(len(groups), math.ceil(limit / mean))
    chosen = [list(groups.values())[i * len(groups) // wanted] for i in range(wanted)]
    return [document for group in chosen for document in group]


# ---- synthetic requests: numbers stand for tokens ----

# Documents, choices, lengths and what they share are those of the real sets under LLaMA's tokenizer
# (means; a spread where it matters), so scoring computes about as many tokens: 58,983 for
# TruthfulQA's two tasks and 1,229,878 for ETHICS.
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


class _Writer:
    def __init__(self, vocab_size: int):
        self.rng, self.vocab_size = np.random.default_rng(0), vocab_size

    def words(self, count: int) -> str:
        return "".join(f" {token}" for token in self.rng.integers(3, self.vocab_size, count))

    def between(self, bounds: Sequence[int]) -> int:
        """Uniform between the quantiles."""
        at = self.rng.uniform(0, len(bounds) - 1)
        return round(float(np.interp(at, range(len(bounds)), bounds)))


def synthetic_truthfulqa(vocab_size: int) -> list[Request]:
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


def synthetic_ethics(vocab_size: int) -> list[Request]:
    writer, requests = _Writer(vocab_size), []
    for subset in ETHICS.values():
        answers = [writer.words(count) for count in subset.answers]
        scenario = ""
        for index in range(subset.documents):
            if index % subset.group == 0:
                scenario = writer.words(subset.shared)
            context = scenario + writer.words(writer.between(subset.own))
            requests += [(context, answer) for answer in answers]
    return requests
