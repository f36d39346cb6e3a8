"""Task: what a language model is asked, how its answers are scored, and what to read beside that.

A task is an instance of a subclass of MultipleChoice, FreeForm or VisionTask, in a file of this
folder.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from mmalign.errors import UserError
from mmalign.evaluation.metrics import caveats
from mmalign.evaluation.statistics import mean_of_tasks_interval

HARNESS_2023 = "lm-evaluation-harness 00209e10f (September 2023), zero-shot"
WILSON = "95% Wilson"
BOOTSTRAP = "95% bootstrap over documents"


def digest(content: bytes) -> str:
    """First 8 hex digits of the sha256; tells whether two evaluations scored the same text."""
    return hashlib.sha256(content).hexdigest()[:8]


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value of a JSON file is a number in this range; neither NaN nor true is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Metric:
    """A number per document whose mean is one row of tables and comparisons."""

    row: str
    value: Callable[[dict], float]  # item -> share, 0 to 1
    right_or_wrong: bool  # whether the value is always 0 or 1


def require_text(value: object, where: str, blank: bool = False) -> str:
    """The value; UserError unless it is text, and more than blanks where `blank` does not allow."""
    if not isinstance(value, str) or not (blank or value.strip()):
        expected = "text" if blank else "text that is not empty"
        raise UserError(f"{where} is {str(value)[:80]!r}; expected {expected}. Download it again")
    return value


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
