"""VQAv2 validation (visualqa.org): ten people's answers to each of 214,354 questions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.tasks import as_released
from mmalign.evaluation.tasks.task import require_text
from mmalign.evaluation.tasks.vision_task import (
    SHORT_ANSWER,
    SUFFIX,
    VisionTask,
    VisualDocument,
    find_file,
)
from mmalign.evaluation.vqa_accuracy import Reading, most_common_answer, vqa_accuracy
from mmalign.files import read_json_value, sha256
from mmalign.model.generate import GenerationOptions

NAME = "vqav2"
FOLDERS = ("vqav2", "vqa-v2", "VQAv2", "vqa")
QUESTIONS = [f"{folder}/v2_OpenEnded_mscoco_val2014_questions.json" for folder in FOLDERS]
ANNOTATIONS = [f"{folder}/v2_mscoco_val2014_annotations.json" for folder in FOLDERS]
COCO_PICTURES = ("coco/val2014", "mscoco/val2014", "val2014", "coco/images/val2014", "coco/images")
NUM_ANNOTATORS = 10


@dataclass(frozen=True, kw_only=True)
class VQAv2(VisionTask):
    right_or_wrong = False
    folders: tuple[str, ...] = COCO_PICTURES
    num_released: tuple[int, int] = (
        2048,
        5000,
    )  # questions for demonstrations, and questions asked

    @property
    def reading(self) -> Reading:
        return "official" if self.released else "standard"

    def read(self, data_root: Path) -> list[VisualDocument]:
        questions_file = find_file(self.name, data_root, QUESTIONS)
        annotations_file = find_file(self.name, data_root, ANNOTATIONS)
        questions = read_json_value(questions_file)["questions"]
        annotations = _by_id(annotations_file, read_json_value(annotations_file)["annotations"])
        _require_same(questions, annotations, questions_file, annotations_file)
        demonstrations = [()] * len(questions)
        if self.released:
            questions, demonstrations = self._drawn(questions, annotations)
        return [
            self._document(doc_id, row, annotations[row["question_id"]], earlier)
            for doc_id, (row, earlier) in enumerate(zip(questions, demonstrations, strict=True))
        ]

    def _document(
        self, doc_id: int, row: dict, annotation: dict, demonstrations: tuple
    ) -> VisualDocument:
        question = row["question"].strip()
        return VisualDocument(
            task=self.name,
            doc_id=doc_id,
            image=f"COCO_val2014_{int(row['image_id']):012d}.jpg",
            question=question if self.released else question + SHORT_ANSWER,
            gold={
                "question_id": row["question_id"],
                "answers": [x["answer"] for x in annotation["answers"]],
                "answer_type": annotation["answer_type"],
            },
            category=annotation["question_type"],
            demonstrations=demonstrations,
        )

    def _drawn(self, questions: list[dict], annotations: dict) -> tuple[list[dict], list[tuple]]:
        """The questions that the scripts ask, and the demonstrations before each of them."""
        num_pool, num_asked = self.num_released
        if len(questions) < num_pool + num_asked:
            raise UserError(
                f"{self.name}: the scripts draw {num_pool:,} questions for demonstrations and ask "
                f"{num_asked:,} others, but the file has {len(questions):,}. Give the whole "
                "validation file, or use --protocol standard"
            )
        rows = [questions[i] for i in as_released.drawn_rows(len(questions), num_pool + num_asked)]
        pool = [
            (x["question"].strip(), annotations[x["question_id"]]["answers"][0]["answer"].strip())
            for x in rows[:num_pool]
        ]
        return rows[num_pool:], as_released.draw_demonstrations(pool, num_asked)

    def data_files(self, data_root: Path) -> dict[str, dict[str, str]]:
        files = (find_file(self.name, data_root, x) for x in (QUESTIONS, ANNOTATIONS))
        return {str(x.relative_to(data_root)): {"sha256": sha256(x)} for x in files}

    def judge(self, document: VisualDocument, text: str) -> dict:
        prediction = as_released.parse_vqa(text) if self.released else text
        answers = document.gold["answers"]
        return {
            "prediction": prediction,
            "score": vqa_accuracy(prediction, answers, self.reading),
            "always_yes": vqa_accuracy("yes", answers, self.reading),
        }

    def details(self, items: Sequence[dict]) -> dict:
        """Scores by type of answer and of question, and those of two constant models."""
        by_answer, by_question = defaultdict(list), defaultdict(list)
        for item in items:
            by_answer[item["gold"]["answer_type"]].append(item["score"])
            by_question[item["category"]].append(item)
        common = []
        for rows in by_question.values():
            answer = most_common_answer([x for item in rows for x in item["gold"]["answers"]])
            common += [vqa_accuracy(answer, item["gold"]["answers"], self.reading) for item in rows]
        return {
            "baselines": {
                "always yes": float(np.mean([item["always_yes"] for item in items])),
                "most common of the question type": float(np.mean(common)),
            },
            "by_answer_type": {
                x: float(np.mean(scores)) for x, scores in sorted(by_answer.items())
            },
            "by_question_type": {
                x: float(np.mean([item["score"] for item in rows]))
                for x, rows in sorted(by_question.items())
            },
        }


def _by_id(path: Path, annotations: list[dict]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for row in annotations:
        question_id = row["question_id"]
        if question_id in found:
            raise UserError(f"{path}: question {question_id} has two annotations. Remove one")
        numbers = [x.get("answer_id") for x in row["answers"]]
        if len(set(numbers)) != NUM_ANNOTATORS or len(numbers) != NUM_ANNOTATORS:
            raise UserError(
                f"{path}: question {question_id} has the answer_id {numbers}; expected "
                f"{NUM_ANNOTATORS} different ones, one of each annotator. Download the file again"
            )
        for x in row["answers"]:
            require_text(x["answer"], f"{path}: an answer to question {question_id}", blank=True)
        found[question_id] = row
    return found


def _require_same(
    questions: list[dict], annotations: dict[int, dict], question_file: Path, annotation_file: Path
) -> None:
    ids: dict[int, int] = {}
    for place, row in enumerate(questions):
        first = ids.setdefault(row["question_id"], place)
        if first != place:
            raise UserError(
                f"{question_file}: entries {first} and {place} (from 0) are both question "
                f"{row['question_id']}. Remove one of them"
            )
    lost, extra = ids.keys() - annotations.keys(), annotations.keys() - ids.keys()
    if lost or extra:
        raise UserError(
            f"{question_file} and {annotation_file.name} do not belong together: "
            f"{len(lost):,} questions have no annotation and {len(extra):,} annotations no "
            f"question (the first: {min(lost or extra)}). Take both files of one split"
        )
    for row in questions:
        question_id = row["question_id"]
        require_text(row["question"], f"{question_file}: the text of question {question_id}")
        if row["image_id"] != (other := annotations[question_id]["image_id"]):
            raise UserError(
                f"{question_file}: question {question_id} is about the picture "
                f"{row['image_id']!r}, but about {other!r} in {annotation_file.name}. Take both "
                "files of one split"
            )


TASKS = (
    VQAv2(
        name=NAME,
        released=False,
        definition="VQA accuracy: min(1, matching annotators / 3) of ten, both sides normalised",
        prompts="LLaVA-1.5: the question, then a request for a single word or phrase",
        options=GenerationOptions(max_new_tokens=16),
    ),
    VQAv2(
        name=NAME + SUFFIX,
        released=True,
        definition="VQA accuracy as the paper's scripts compute it, which normalise nothing where "
        'all annotators agree: there "Yes" against "yes" counts 0',
        prompts=as_released.PROMPTS,
        options=as_released.OPTIONS,
    ),
)
