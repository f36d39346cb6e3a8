"""Tasks in which the model answers in its own words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mmalign.evaluation.tasks.task import Task, is_number
from mmalign.model.generate import GenerationOptions


@dataclass(frozen=True)
class OpenDocument:
    """One question that the model answers in its own words."""

    task: str
    doc_id: int  # index in the file
    prompt: str


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
