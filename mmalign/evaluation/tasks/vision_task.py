"""VisionTask: questions about pictures that the model answers in its own words.

Two protocols, whose scores never share a name:

    standard      greedy, the model's own template, LLaVA-1.5's prompts, official metrics
    as-released   what the scripts of Sight-Beyond-Text ran (as_released.py): POPE's task is then
                  pope_as_released, and so on

Intervals count the questions about one picture as one draw.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from mmalign.errors import UserError
from mmalign.evaluation.metrics import caveats
from mmalign.evaluation.statistics import (
    bootstrap_means,
    effective_n,
    percentile_interval,
    wilson_interval,
)
from mmalign.evaluation.tasks.task import Metric, Task, digest, is_number
from mmalign.evaluation.yes_no_scores import auroc_values
from mmalign.model.generate import Generation, GenerationOptions

Protocol = Literal["standard", "as-released"]
PROTOCOLS: tuple[Protocol, ...] = ("standard", "as-released")
SUFFIX = "_as_released"  # of task names
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's
WILSON_PICTURES = "95% Wilson, questions about one picture counted as one draw (design effect)"
BOOTSTRAP_PICTURES = "95% bootstrap over pictures"


@dataclass(frozen=True, kw_only=True)
class VisualDocument:
    """One question about one picture."""

    task: str
    doc_id: int
    image: str  # path under data_root
    question: str  # as the model is asked
    gold: Any  # what the answer is compared with, as JSON
    category: str = ""  # part of the task that has a score of its own
    demonstrations: tuple[tuple[str, str], ...] = ()  # earlier turns, text only

    @property
    def name(self) -> str:
        return f"{self.task} question {self.doc_id} ({self.image})"

    @property
    def digest(self) -> str:
        turns = "\0".join(text for turn in self.demonstrations for text in turn)
        return digest(f"{turns}\0{self.image}\0{self.question}\0{self.gold}".encode())


@dataclass(frozen=True)
class VisualAnswer:
    generation: Generation
    log_odds: float | None = None  # of yes against no as the first word; None: not a yes/no task


@dataclass(frozen=True, kw_only=True)
class VisionTask(Task):
    kind = "vision"
    item_keys = frozenset(
        ("task", "doc_id", "image", "question", "answer", "reason", "gold", "score", "sha256")
    )
    asks_yes_no: ClassVar[bool] = False
    right_or_wrong: ClassVar[bool] = True  # whether a score is always 0 or 1
    largest: ClassVar[float] = 1.0  # score of a document

    released: bool  # the protocol as-released
    options: GenerationOptions
    folders: tuple[str, ...] = ()  # under data_root, that may hold the pictures; empty: read says

    def load(self, data_root: str | Path, limit: int | None = None) -> list[VisualDocument]:
        """As Task.load; pictures are looked for only where they are asked about."""
        documents, root = super().load(data_root, limit), Path(data_root)
        if not self.folders:
            return documents
        found = find_pictures(self.name, root, self.folders, [x.image for x in documents])
        return [replace(x, image=path) for x, path in zip(documents, found, strict=True)]

    @property
    def protocol_name(self) -> Protocol:
        return "as-released" if self.released else "standard"

    @abstractmethod
    def judge(self, document: VisualDocument, text: str) -> dict:
        """{"score", and what explains it} of an answer."""

    @abstractmethod
    def details(self, items: Sequence[dict]) -> dict:
        """What stands beside the score in results.json, "baselines" (constant answers) included."""

    # ---- the rest is the same for all ----

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {
            "protocol": self.protocol_name,
            "score": "mean over the questions",
            "generation": asdict(self.options),
        }

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric(self.name, itemgetter("score"), self.right_or_wrong),)

    def beside(
        self, items: Sequence[dict], base_items: Sequence[dict] | None
    ) -> Mapping[str, ArrayLike]:
        """Of yes/no questions: auroc (ours), and the share of yes among parsed answers."""
        if not self.asks_yes_no:
            return {}
        says_yes = {"yes": 1.0, "no": 0.0, None: np.nan}
        answers = [says_yes[item["prediction"]] for item in items]
        found: dict[str, ArrayLike] = {} if np.isnan(answers).all() else {"yes_rate": answers}
        if all("log_odds" in item for item in items):
            odds = np.array([item["log_odds"] for item in items])
            area = auroc_values(odds, np.array([item["gold"] == "yes" for item in items]))
            found |= {} if area is None else {"auroc": area}
        return found

    def make_items(
        self, documents: Sequence[VisualDocument], answers: Sequence[VisualAnswer]
    ) -> list[dict]:
        return [self._item(x, answer) for x, answer in zip(documents, answers, strict=True)]

    def _item(self, document: VisualDocument, answer: VisualAnswer) -> dict:
        generation = answer.generation
        text = generation.text
        if self.released and generation.reason == "stop":
            text += "###"  # the scripts do not cut it off
        item = {
            "task": self.name,
            "doc_id": document.doc_id,
            "image": document.image,
            "question": document.question,
            "answer": text,
            "reason": generation.reason,
            "gold": document.gold,
            **self.judge(document, text),
            "sha256": document.digest,
            "group_id": document.image,  # compare.py resamples pictures
        }
        item |= {"category": document.category} if document.category else {}
        return item if answer.log_odds is None else item | {"log_odds": answer.log_odds}

    def summarize(self, items: Sequence[dict]) -> dict:
        """acc: mean score; details' keys; length and kind of the answers."""
        words = [len(item["answer"].split()) for item in items]
        return {
            "acc": float(np.mean([item["score"] for item in items])),
            "n": len(items),
            "num_pictures": len({item["image"] for item in items}),
            **self.interval(items),
            **self.details(items),
            "mean_words": float(np.mean(words)),
            "num_empty": words.count(0),
            "num_unfinished": sum(item["reason"] == "length" for item in items),
        }

    def interval(self, items: Sequence[dict]) -> dict:
        """{"interval": 95%, "interval_method"} of the mean score."""
        scores, images = [x["score"] for x in items], [x["image"] for x in items]
        if self.right_or_wrong:
            bounds = wilson_interval(float(np.mean(scores)), effective_n(scores, images))
            return {"interval": bounds, "interval_method": WILSON_PICTURES}
        bounds = percentile_interval(bootstrap_means(scores, images))
        return {"interval": bounds, "interval_method": BOOTSTRAP_PICTURES}

    def caveats(self, summary: dict) -> list[str]:
        sentences = caveats(self.name, summary)
        if number := summary["num_empty"]:
            sentences.append(f"{self.name}: {number:,} of {summary['n']:,} answers are empty.")
        if number := summary["num_unfinished"]:
            sentences.append(
                f"{self.name}: {number:,} of {summary['n']:,} answers were cut at "
                f"{self.options.max_new_tokens} tokens."
            )
        return sentences

    def example(self, item: dict) -> tuple[str, list[str]]:
        return f"[{item['image']}] {item['question']}", [item["answer"]]

    def _problems(self, item: dict) -> Iterator[str]:
        if not all(isinstance(item[x], str) for x in ("image", "question", "answer", "reason")):
            yield "image, question, answer or reason is not text"
        if not is_number(item["score"], 0, self.largest):
            yield f"score is {item['score']!r}; expected a number from 0 to {self.largest:g}"


def find_file(task: str, data_root: Path, names: Sequence[str]) -> Path:
    """The first of these files under data_root; UserError where there is none."""
    for name in names:
        if (data_root / name).is_file():
            return data_root / name
    raise UserError(
        f"{task} needs one of these files under {data_root}, and none exists: {', '.join(names)}. "
        "scripts/README.md says where they come from"
    )


def find_pictures(
    task: str, data_root: Path, folders: Sequence[str], names: Sequence[str]
) -> list[str]:
    """The path under data_root of every picture, which lies in one of the folders.

    Raises UserError for pictures that are in none of them.
    """
    known: dict[str, str] = {}
    missing = []
    for name in dict.fromkeys(names):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{task}: the picture {name!r} lies outside its folder. Download the file of the "
                "questions again, from a source that you trust"
            )
        places = (f"{folder}/{name}" for folder in folders)
        found = next((x for x in places if (data_root / x).is_file()), None)
        if found is None:
            missing.append(name)
        else:
            known[name] = found
    if missing:
        more = f" and {len(missing) - 1:,} more pictures" if missing[1:] else ""
        raise UserError(
            f"{task}: {missing[0]}{more} of {len(known) + len(missing):,} not found. Looked in "
            f"{', '.join(folders)} under {data_root}. Put them there; a link will do"
        )
    return [known[name] for name in names]
