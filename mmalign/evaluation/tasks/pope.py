"""POPE on COCO (github.com/RUCAIBox/POPE): is an object in the picture?

Three files of the same pictures, whose absent objects are random, frequent ("popular") or often
beside the present ones ("adversarial"). The random file exists with 3,000 lines and, as LLaVA-1.5
used it, with 2,910: the number of lines stands in the results.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.metrics import caveats, percent
from mmalign.evaluation.tasks import as_released
from mmalign.evaluation.tasks.task import require_text
from mmalign.evaluation.tasks.vision_task import (
    SHORT_ANSWER,
    SUFFIX,
    VisionTask,
    VisualDocument,
    find_file,
)
from mmalign.evaluation.tasks.vqav2 import COCO_PICTURES
from mmalign.evaluation.yes_no import auroc, parse_pope, parse_yes_no, yes_no_scores
from mmalign.files import read_text, sha256
from mmalign.model.generate import GenerationOptions

NAME = "pope"
CATEGORIES = ("random", "popular", "adversarial")
FOLDERS = ("pope", "pope/output/coco", "POPE/output/coco", "pope/coco")


@dataclass(frozen=True, kw_only=True)
class Pope(VisionTask):
    asks_yes_no = True
    folders: tuple[str, ...] = COCO_PICTURES

    def read(self, data_root: Path) -> list[VisualDocument]:
        """The lines of the three files in turn, so that a limit takes as many of each."""
        by_category = [_read(self._file(data_root, x), x) for x in CATEGORIES]
        rows = [row for row in chain(*zip_longest(*by_category)) if row]
        return [
            VisualDocument(
                task=self.name,
                doc_id=doc_id,
                image=row["image"],
                question=row["text"].strip() + ("" if self.released else SHORT_ANSWER),
                gold=row["label"],
                category=row["category"],
            )
            for doc_id, row in enumerate(rows)
        ]

    def _file(self, data_root: Path, category: str) -> Path:
        names = [f"{folder}/coco_pope_{category}.json" for folder in FOLDERS]
        return find_file(self.name, data_root, names)

    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        files = (self._file(data_root, x) for x in CATEGORIES)
        return {str(x.relative_to(data_root)): {"sha256": sha256(x)} for x in files}

    def judge(self, document: VisualDocument, text: str) -> dict:
        prediction = parse_pope(text) if self.released else parse_yes_no(text)
        return {"prediction": prediction, "score": float(prediction == document.gold)}

    def details(self, items: Sequence[dict]) -> dict:
        """Scores of all, and of each category; f1 is the categories' mean, as LLaVA-1.5's."""
        parts = {
            name: rows
            for name in CATEGORIES
            if (rows := [item for item in items if item["category"] == name])
        }
        categories = {name: _scores(rows) | self.interval(rows) for name, rows in parts.items()}
        f1 = float(np.mean([part["f1"] for part in categories.values()]))
        return _scores(items) | {"f1": f1, "categories": categories}

    def rows(self, summary: dict) -> dict[str, dict]:
        parts = summary["categories"].items()
        return {self.name: summary} | {f"{self.name}_{name}": part for name, part in parts}

    def caveats(self, summary: dict) -> list[str]:
        official = summary["official_parser"]
        sentences = [
            f"{self.name}: F1 {percent(summary['f1'])}, the mean of the three files; by the "
            f"published parser accuracy {percent(official['accuracy'])}, yes "
            f"{percent(official['yes_ratio'])}.",
            *super().caveats(summary),
        ]
        for name, part in summary["categories"].items():
            sentences += caveats(f"{self.name}_{name}", part)
        if number := summary["unparsed"]:
            sentences.append(
                f"{self.name}: {number:,} of {summary['n']:,} answers hold neither yes nor no; "
                "they count as wrong."
            )
        return sentences


def _scores(items: Sequence[dict]) -> dict:
    """Of the answers as they were parsed, by the official parser, and, ours, by log-odds."""
    labels = [item["gold"] for item in items]
    scores = yes_no_scores(labels, [item["prediction"] for item in items])
    official = yes_no_scores(labels, [parse_pope(item["answer"]) for item in items])
    num_yes = labels.count("yes") / len(labels)
    found = {
        "acc": scores.pop("accuracy"),
        "n": len(items),
        "chance": 0.5,
        "baselines": {"always yes": num_yes, "always no": 1 - num_yes},
        "yes_rate": scores.pop("yes_ratio"),
        "gold_yes_rate": num_yes,
        **scores,
        "official_parser": official,
    }
    odds = [item["log_odds"] for item in items if "log_odds" in item]
    if len(odds) == len(items):
        right = [(x > 0) == (label == "yes") for x, label in zip(odds, labels, strict=True)]
        found["ours"] = {"auroc": auroc(labels, odds), "acc_by_log_odds": float(np.mean(right))}
    return found


def _read(path: Path, category: str) -> list[dict]:
    rows, places = [], {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            row = {key: row[key] for key in ("image", "text", "label")}
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a question of POPE ({type(error).__name__}: {error}); "
                "expected an object with image, text and label. Download the file again"
            ) from error
        for key, value in row.items():
            require_text(value, f"{path}, line {number}: its {key}")
        if row["label"] not in ("yes", "no"):
            raise UserError(
                f"{path}, line {number}: the label is {row['label']!r}; expected yes or no"
            )
        first = places.setdefault((row["image"], row["text"].strip()), number)
        if first != number:
            raise UserError(
                f"{path}, line {number} asks the same about the same picture as line {first}. "
                "Remove one of them"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} contains no question. Download it again")
    return [row | {"category": category} for row in rows]


TASKS = (
    Pope(
        name=NAME,
        released=False,
        definition="accuracy over POPE's three files; a yes is the first word yes in the answer, "
        "answers with neither yes nor no are wrong",
        prompts="LLaVA-1.5: the question, then a request for a single word or phrase",
        options=GenerationOptions(max_new_tokens=16),
    ),
    Pope(
        name=NAME + SUFFIX,
        released=True,
        definition="accuracy over POPE's three files by the published parser, for which everything "
        "without the word no is a yes",
        prompts=as_released.PROMPTS,
        options=as_released.OPTIONS,
    ),
)
