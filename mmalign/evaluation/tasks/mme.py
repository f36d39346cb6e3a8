"""MME (Fu et al. 2023): a yes and a no question about each picture of 14 subtasks.

Subtasks come in two published layouts: pictures and texts in one folder, or in images/ and
questions_answers_YN/. A text of two lines, "question<TAB>Yes" and "question<TAB>No", belongs to the
picture of its name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.statistics import Z95
from mmalign.evaluation.tasks import as_released
from mmalign.evaluation.tasks.vision_task import SHORT_ANSWER, SUFFIX, VisionTask, VisualDocument
from mmalign.evaluation.yes_no import (
    COGNITION,
    NOT_SCORED_AS_RELEASED,
    PERCEPTION,
    auroc,
    mme_scores,
    mme_totals,
    parse_mme,
)
from mmalign.files import read_text, sha256
from mmalign.model.generate import GenerationOptions

NAME = "mme"
FOLDERS = ("mme", "mme/MME_Benchmark_release_version", "MME_Benchmark_release_version", "MME")
REQUEST = " Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")
MOST = 200  # points of a subtask
_POINTS = "95%, from the spread between pictures of each subtask"


@dataclass(frozen=True, kw_only=True)
class Mme(VisionTask):
    asks_yes_no = True

    @property
    def left_out(self) -> tuple[str, ...]:
        """Subtasks that are not asked."""
        return NOT_SCORED_AS_RELEASED if self.released else ()

    def read(self, data_root: Path) -> list[VisualDocument]:
        """Both questions about a picture, one picture of each subtask in turn."""
        by_subtask = [self._pairs(data_root, *x) for x in self._subtasks(data_root)]
        pairs = [pair for pair in chain(*zip_longest(*by_subtask)) if pair]
        return [
            VisualDocument(
                task=self.name,
                doc_id=doc_id,
                image=image,
                question=self._question(question),
                gold=label,
                category=subtask,
            )
            for doc_id, (subtask, image, question, label) in enumerate(chain(*pairs))
        ]

    def _question(self, text: str) -> str:
        return text if self.released else text.removesuffix(REQUEST) + SHORT_ANSWER

    def _subtasks(self, data_root: Path) -> list[tuple[str, Path]]:
        """(name, folder of its texts); UserError where one is missing."""
        root = next(
            (data_root / x for x in FOLDERS if (data_root / x / "existence").is_dir()), None
        )
        if root is None:
            raise UserError(
                f"{self.name} needs the folder of MME's subtasks (existence, count ...) at one of "
                f"{', '.join(FOLDERS)} under {data_root}"
            )
        names = [name for name in (*PERCEPTION, *COGNITION) if name not in self.left_out]
        if missing := [name for name in names if not (root / name).is_dir()]:
            raise UserError(f"{root} lacks {', '.join(missing)}. Put all subtasks there")
        known = {*PERCEPTION, *COGNITION}
        for path in sorted(root.iterdir()):
            if path.name not in known and any(_texts(path)):
                raise UserError(
                    f"{path} holds questions, but MME has no subtask {path.name!r}, so they would "
                    f"not be asked. Rename it, or move it out of {root}"
                )
        return [(name, _folder_of_texts(root / name)) for name in names]

    def _pairs(self, data_root: Path, subtask: str, folder: Path) -> list[list[tuple]]:
        pictures = folder.parent / "images" if folder.name == "questions_answers_YN" else folder
        return [
            [(subtask, _picture(path, pictures, data_root), *line) for line in _read_pair(path)]
            for path in sorted(folder.glob("*.txt"))
        ]

    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        files = chain(*(sorted(x.glob("*.txt")) for _, x in self._subtasks(data_root)))
        return {str(x.relative_to(data_root)): {"sha256": sha256(x)} for x in files}

    def judge(self, document: VisualDocument, text: str) -> dict:
        prediction = parse_mme(text)
        return {"prediction": prediction, "score": float(prediction == document.gold)}

    def details(self, items: Sequence[dict]) -> dict:
        """Points of every subtask, and their sums; a constant answer gets 50 of 200."""
        names = [x for x in (*PERCEPTION, *COGNITION) if any(i["category"] == x for i in items)]
        subtasks = {}
        for name in names:
            rows = [item for item in items if item["category"] == name]
            right = [item["score"] == 1 for item in rows]
            subtasks[name] = mme_scores([item["image"] for item in rows], right)
            subtasks[name]["variance"] = _variance(rows)
            subtasks[name]["n"] = len(rows)
        totals = mme_totals({name: found["score"] for name, found in subtasks.items()})
        answered = [item["prediction"] for item in items if item["prediction"]]
        found = {
            "chance": 0.5,
            "baselines": {"always yes": float(np.mean([x["gold"] == "yes" for x in items]))},
            "yes_rate": answered.count("yes") / max(1, len(answered)),
            "gold_yes_rate": float(np.mean([item["gold"] == "yes" for item in items])),
            "unparsed": len(items) - len(answered),
            "subtasks": subtasks,
            **totals,
        }
        if all("log_odds" in item for item in items):
            odds = [item["log_odds"] for item in items]
            found["ours"] = {"auroc": auroc([item["gold"] for item in items], odds)}
        return found

    def rows(self, summary: dict) -> dict[str, dict]:
        """Accuracy, and the points of both halves as shares of their maximum."""
        rows = {self.name: summary}
        for half, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
            parts = [x for name, x in summary["subtasks"].items() if name in names]
            if not parts:
                continue
            most = MOST * len(parts)
            spread = Z95 * math.sqrt(sum(part["variance"] for part in parts)) / most
            share = summary[half] / most
            rows[f"{self.name}_{half}"] = {
                "acc": share,
                "interval": (max(0.0, share - spread), min(1.0, share + spread)),
                "interval_method": _POINTS,
                "n": sum(part["n"] for part in parts),
                "chance": 75 / MOST,
                "baselines": {"always yes": 50 / MOST},
            }
        return rows

    def caveats(self, summary: dict) -> list[str]:
        points = [
            f"{half} {summary[half]:.1f} of {MOST * sum(x in names for x in summary['subtasks']):,}"
            for half, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        ]
        without = f", without {' and '.join(self.left_out)}" if self.left_out else ""
        sentence = (
            f"{self.name}: {', '.join(points)} points{without}; always yes gets 50 of each 200."
        )
        return [sentence, *super().caveats(summary)]


def _variance(items: Sequence[dict]) -> float:
    """Of a subtask's points, from those of its pictures; 0 with a single picture."""
    pairs: dict[str, list[float]] = {}
    for item in items:
        pairs.setdefault(item["image"], []).append(item["score"])
    points = [100 * (np.mean(right) + min(right)) for right in pairs.values()]
    return float(np.var(points, ddof=1) / len(points)) if len(points) > 1 else 0.0


def _texts(subtask: Path) -> tuple[list[Path], list[Path]]:
    """Of the two layouts: in the folder itself, and in questions_answers_YN."""
    return list(subtask.glob("*.txt")), list(subtask.glob("questions_answers_YN/*.txt"))


def _folder_of_texts(subtask: Path) -> Path:
    found = [texts[0].parent for texts in _texts(subtask) if texts]
    if len(found) != 1:
        raise UserError(
            f"{subtask}: expected questions (*.txt) there or in questions_answers_YN, found "
            f"{'both' if found else 'none'}. Put the published folder there"
        )
    return found[0]


def _read_pair(path: Path) -> list[tuple[str, str]]:
    """(question, yes or no) of both lines."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    pair = [tuple(line.split("\t")) for line in lines]
    labels = [row[-1].strip().lower() for row in pair]
    if len(pair) != 2 or any(len(row) != 2 for row in pair) or set(labels) != {"yes", "no"}:
        raise UserError(
            f"{path}: expected two lines, a question, a tab and Yes, and the same with No; found "
            f"{lines[:3]!r}. Download the file again"
        )
    if pair[0][0].strip() == pair[1][0].strip():
        raise UserError(
            f"{path}: both lines ask the same, one with Yes and one with No. Download it again"
        )
    return [(row[0].strip(), label) for row, label in zip(pair, labels, strict=True)]


def _picture(text: Path, folder: Path, data_root: Path) -> str:
    for ending in PICTURES:
        path = folder / f"{text.stem}{ending}"
        if path.is_file():
            return str(path.relative_to(data_root))
    raise UserError(
        f"{text}: its picture is missing: {folder / text.stem} with {' or '.join(PICTURES)}. Put "
        "it there"
    )


TASKS = (
    Mme(
        name=NAME,
        released=False,
        definition="accuracy; perception and cognition: MME's points, 100 times accuracy plus 100 "
        "times the share of pictures with both answers right, as a share of their maximum",
        prompts="LLaVA-1.5: the question, then a request for a single word or phrase",
        options=GenerationOptions(max_new_tokens=16),
    ),
    Mme(
        name=NAME + SUFFIX,
        released=True,
        definition="as mme, without landmark and artwork",
        prompts=as_released.PROMPTS,
        options=as_released.OPTIONS,
    ),
)
