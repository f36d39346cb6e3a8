"""Tasks in which the model chooses: by the log-likelihoods of a document's choices."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmalign.evaluation.metrics import caveats, exact_match, mean_tokens
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.statistics import effective_n, wilson_interval
from mmalign.evaluation.tasks.task import WILSON, Metric, Task, digest, is_number

WILSON_GROUPS = f"{WILSON}, documents of one group counted as one draw (design effect)"


@dataclass(frozen=True)
class Document:
    """One question, with the choices whose log-likelihoods answer it."""

    task: str
    doc_id: int  # index in the file
    requests: tuple[tuple[str, str], ...]  # (context, continuation) of every choice
    gold: int | tuple[int, ...]  # index of the right choice, or a label 0 or 1 for each choice
    group_id: int | None = None  # documents about one scenario share it
    category: str | None = None  # documents about one topic share it
    part: str | None = None  # of the file, with a score of its own
    # the choices again after a context without the question: (context, continuation) of each
    answers_only: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.task} document {self.doc_id}"

    @property
    def digest(self) -> str:
        return digest(request_bytes([self]))


def request_bytes(documents: Sequence[Document]) -> bytes:
    """All requests in order, in the form that the harness's request hashes use."""
    pairs = (request for document in documents for request in document.requests)
    return "".join(f"{context}\0{continuation}\n" for context, continuation in pairs).encode()


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """The model answers with the choice of the largest summed log-probability, ties: the first.

    As it stands, a score is 1 or 0, chance is 1 / number of choices, and the constant answer is
    the shortest choice. A subclass writes read and data_files, and overrides what differs.
    """

    kind = "loglikelihood"
    item_keys = frozenset(
        ("task", "doc_id", "context", "choices", "prediction", "gold", "score", "sha256")
    )
    right_or_wrong: ClassVar[bool] = True

    def predict(self, document: Document, loglikelihoods: Sequence[float]) -> int:
        """Index of the choice that the model prefers."""
        return loglikelihoods.index(max(loglikelihoods))

    def score(self, document: Document, loglikelihoods: Sequence[float]) -> float:
        """What the document adds to the task's mean, 0 to 1."""
        return float(self.predict(document, loglikelihoods) == document.gold)

    def interval(self, items: Sequence[dict]) -> tuple[tuple[float, float], str]:
        """95% interval of the mean score, and how it was computed."""
        scores = [item["score"] for item in items]
        mean, n = float(np.mean(scores)), len(items)
        if self.group_size is None:
            return wilson_interval(mean, n), WILSON
        groups = [item["group_id"] for item in items]
        return wilson_interval(mean, effective_n(scores, groups)), WILSON_GROUPS

    def references(self, items: Sequence[dict]) -> dict:
        """What a model scores for nothing ("chance", "baselines"), and lengths of the choices."""
        lengths = [[choice["num_tokens"] for choice in item["choices"]] for item in items]
        shortest = [size.index(min(size)) for size in lengths]
        right = [item["gold"] == i for item, i in zip(items, shortest, strict=True)]
        return {
            "chance": float(np.mean([1 / len(item["choices"]) for item in items])),
            "baselines": {"always the shortest": float(np.mean(right))},
            "choice_tokens": choice_tokens(items, [[item["gold"]] for item in items]),
        }

    def questions(self, data_root: Path) -> list[str]:
        """The different texts that are asked about, without the prompt where a subclass does so."""
        contexts = (context for x in self.load(data_root) for context, _ in x.requests)
        return list(dict.fromkeys(contexts))

    # ---- the rest is the same for all ----

    def protocol(self) -> dict[str, Any]:
        score = "sum of the log-probabilities of the choice's tokens, not divided by their number"
        return super().protocol() | {"score": score}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric(self.name, itemgetter("score"), self.right_or_wrong),)

    def make_items(self, documents: Sequence[Document], answers: Sequence) -> list[dict]:
        return [self.make_item(x, scores) for x, scores in zip(documents, answers, strict=True)]

    def _problems(self, item: dict) -> Iterator[str]:
        if not is_number(item["score"], 0, 1):
            yield f"score is {item['score']!r}; expected a number from 0 to 1"
        choices = item["choices"]
        if not isinstance(choices, list) or not choices or not all(map(_is_choice, choices)):
            yield "choices lack a text, a finite loglikelihood or a number of tokens"
            return
        gold, indices = item["gold"], range(len(choices))
        if isinstance(gold, list):
            right = len(gold) == len(choices) and all(label in (0, 1) for label in gold)
        else:
            right = isinstance(gold, int) and gold in indices
        if not right:
            yield f"gold is {gold!r}, with {len(choices)} choices"
        if not isinstance(item["prediction"], int) or item["prediction"] not in indices:
            yield f"prediction is {item['prediction']!r}, with {len(choices)} choices"
        if not isinstance(item["context"], str):
            yield "context is not text"
        if self.group_size and not isinstance(item.get("group_id"), int):
            yield "group_id is missing"

    def make_item(self, document: Document, scores: Sequence[Score]) -> dict:
        """scores: one for each request of the document, then one for each of its answers_only."""
        scores, alone = scores[: len(document.requests)], scores[len(document.requests) :]
        loglikelihoods = [score.loglikelihood for score in scores]
        item = {
            "task": document.task,
            "doc_id": document.doc_id,
            "context": document.requests[0][0],
            "choices": [
                {
                    "text": continuation,
                    "loglikelihood": score.loglikelihood,
                    "num_tokens": score.num_tokens,
                }
                for (_, continuation), score in zip(document.requests, scores, strict=True)
            ],
            "prediction": self.predict(document, loglikelihoods),
            "gold": document.gold,
            "score": self.score(document, loglikelihoods),
            "sha256": document.digest,
        }
        for choice, score in zip(item["choices"], alone, strict=bool(alone)):
            choice["answer_only_loglikelihood"] = score.loglikelihood
        for key in ("group_id", "category", "part"):
            if getattr(document, key) is not None:
                item[key] = getattr(document, key)
        if truncated := max(score.num_truncated for score in scores):
            item["num_truncated"] = truncated
        return item

    def summarize(self, items: Sequence[dict]) -> dict:
        scores, n = [item["score"] for item in items], len(items)
        summary: dict[str, Any] = {"acc": float(np.mean(scores)), "n": n}
        if self.group_size:
            summary["em"] = exact_match(items, scores, self.group_size)
        summary["stderr"] = float(np.std(scores, ddof=1) / n**0.5) if n > 1 else None
        summary["interval"], summary["interval_method"] = self.interval(items)
        summary |= self.references(items)
        summary["num_truncated"] = sum("num_truncated" in item for item in items)
        return summary

    def caveats(self, summary: dict) -> list[str]:
        return caveats(self.name, summary)

    def example(self, item: dict) -> tuple[str, list[str]]:
        return item["context"], [choice["text"] for choice in item["choices"]]


def _is_choice(choice: object) -> bool:
    if not isinstance(choice, dict):
        return False
    number = is_number(choice.get("num_tokens"), 1, 1e9)
    lowest = -sys.float_info.max
    return (
        number
        and isinstance(choice.get("text"), str)
        and is_number(choice.get("loglikelihood"), lowest, 1)
    )


def choice_tokens(items: Sequence[dict], true: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean length of the true and of the false choices; true: indices for each item."""
    pairs = list(zip(items, true, strict=True))
    return {
        "true": mean_tokens(item["choices"][i] for item, right in pairs for i in right),
        "false": mean_tokens(
            choice
            for item, right in pairs
            for i, choice in enumerate(item["choices"])
            if i not in right
        ),
    }
