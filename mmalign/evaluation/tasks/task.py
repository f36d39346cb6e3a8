"""Task: what a language model is asked, how its answers are scored, and what to read beside that.

A task is an instance of a subclass of MultipleChoice, FreeForm or VisionTask, in a file of this
folder.
"""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from mmalign.errors import UserError
from mmalign.evaluation.metrics import caveats, exact_match, mean_tokens
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.statistics import effective_n, mean_of_tasks_interval, wilson_interval
from mmalign.model.generate import GenerationOptions

HARNESS_2023 = "lm-evaluation-harness 00209e10f (September 2023), zero-shot"
WILSON = "95% Wilson"
WILSON_GROUPS = "95% Wilson, documents of one group counted as one draw (design effect)"
BOOTSTRAP = "95% bootstrap over documents"


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


@dataclass(frozen=True)
class OpenDocument:
    """One question that the model answers in its own words."""

    task: str
    doc_id: int  # index in the file
    prompt: str


def request_bytes(documents: Sequence[Document]) -> bytes:
    """All requests in order, in the form that the harness's request hashes use."""
    pairs = (request for document in documents for request in document.requests)
    return "".join(f"{context}\0{continuation}\n" for context, continuation in pairs).encode()


def digest(content: bytes) -> str:
    """First 8 hex digits of the sha256; tells whether two evaluations scored the same text."""
    return hashlib.sha256(content).hexdigest()[:8]


@dataclass(frozen=True)
class Metric:
    """A number per document whose mean is one row of tables and comparisons."""

    row: str
    value: Callable[[dict], float]  # item -> share, 0 to 1
    right_or_wrong: bool  # whether the value is always 0 or 1


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What evaluation, comparison and report need of a task; they know no task by name."""

    kind: ClassVar[Literal["loglikelihood", "generate", "vision"]]
    item_keys: ClassVar[frozenset[str]]  # that every line of items.jsonl has

    name: str
    definition: str  # of its score, for the report
    prompts: str = HARNESS_2023  # where the wording of the questions comes from
    group: str = ""  # name for several tasks together on the command line
    aliases: tuple[str, ...] = ()  # other names on the command line
    group_size: int | None = None  # consecutive documents about one scenario

    def load(self, data_root: str | Path, limit: int | None = None) -> list:
        """The documents in file order, at most the first `limit`.

        Raises UserError for a missing or malformed file.
        """
        root = Path(data_root)
        try:
            documents = self.read(root)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name}: {', '.join(self.data_files(root))} under {root} is not in its "
                f"published form ({type(error).__name__}: {error})"
            ) from error
        if not documents:
            raise UserError(
                f"{self.name}: {', '.join(self.data_files(root))} under {root} is empty"
            )
        return documents[:limit]

    @abstractmethod
    def read(self, data_root: Path) -> list:
        """All documents in file order."""

    @abstractmethod
    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        """{path under data_root: {"sha256", optionally "variant"}} of every file that read uses."""

    @abstractmethod
    def make_items(self, documents: Sequence, answers: Sequence) -> list[dict]:
        """Lines of items.jsonl; answers: what the model gave for each document."""

    @abstractmethod
    def summarize(self, items: Sequence[dict]) -> dict:
        """The task's object in results.json."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Whatever a comparison of two models pairs document by document."""

    def beside(
        self, items: Sequence[dict], base_items: Sequence[dict] | None
    ) -> Mapping[str, ArrayLike]:
        """Metrics beside these that resist artefacts: name -> (num_documents,) values.

        Their mean is the metric; NaN: not one of its documents. base_items: of the base model on
        the same documents.
        """
        return {}

    @abstractmethod
    def example(self, item: dict) -> tuple[str, list[str]]:
        """What the model was asked, and its choices or answer, for the report."""

    @abstractmethod
    def _problems(self, item: dict) -> Iterator[str]:
        """What in a line of items.jsonl cannot be; it has all item_keys."""

    def problem(self, item: dict) -> str:
        """The first of these; empty for a good item."""
        if not isinstance(item["doc_id"], int) or not isinstance(item["sha256"], str):
            return "doc_id or sha256 is damaged"
        return next(self._problems(item), "")

    def protocol(self) -> dict[str, Any]:
        """Settings that two evaluations have to share to be compared."""
        return {"prompts": self.prompts}

    def rows(self, summary: dict) -> dict[str, dict]:
        """{row: {"acc", "interval", "interval_method", "n", ...}} of tables and figures."""
        return {self.name: summary}

    def caveats(self, summary: dict) -> list[str]:
        """Sentences about what the score does not show."""
        return []


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


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value of a JSON file is a number in this range; neither NaN nor true is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


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


@dataclass(frozen=True, kw_only=True)
class FreeForm(Task):
    """The model continues the prompt of each OpenDocument; make_items scores the Generation."""

    kind = "generate"
    item_keys = frozenset(("task", "doc_id", "question", "answer", "reason", "scores", "sha256"))
    options: GenerationOptions

    def _problems(self, item: dict) -> Iterator[str]:
        if not all(isinstance(item[key], str) for key in ("question", "answer", "reason")):
            yield "question, answer or reason is not text"
        names = {metric.row for metric in self.metrics}
        for key in ("scores", "constant_scores"):
            scores = item.get(key)
            if not isinstance(scores, dict) or not scores:
                yield f"{key} is not an object of scores"
                return
            for name, score in scores.items():
                if not is_number(score, -100, 100):
                    yield f"{name} of {key} is {score!r}; expected a number from -100 to 100"
            if missing := names - {f"{self.name}_{name}" for name in scores}:
                yield f"{key} lacks {', '.join(sorted(missing))}"

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"generation": asdict(self.options)}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Unweighted mean of tasks with different documents; exists where all of them were scored."""

    name: str
    members: tuple[str, ...]
    definition: str

    def summarize(self, results: dict[str, dict]) -> dict:
        """results: the summaries of all members."""
        summaries = [results[task] for task in self.members]
        accs = [summary["acc"] for summary in summaries]
        return {
            "acc": float(np.mean(accs)),
            "interval": mean_of_tasks_interval(accs, [x["interval"] for x in summaries]),
            "interval_method": f"95%, from the intervals of the {len(accs)} tasks",
            "chance": float(np.mean([summary["chance"] for summary in summaries])),
        }

    def rows(self, summary: dict) -> dict[str, dict]:
        return {self.name: summary}

    def caveats(self, summary: dict) -> list[str]:
        return caveats(self.name, summary)
