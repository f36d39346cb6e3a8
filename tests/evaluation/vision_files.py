"""Small published-like files of the tasks about pictures."""

import json
from pathlib import Path

from PIL import Image

NUM_PICTURES = 4


def coco_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def save_pictures(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (60 * number % 256, 80, 200)).save(folder / name)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_vqa(root: Path, folder: str = "vqav2") -> tuple[Path, Path]:
    """Three questions about each picture; ten times the same answer to the first of them."""
    questions, annotations = [], []
    for image_id in range(NUM_PICTURES):
        for number, (text, answers) in enumerate(
            (
                ("Is there a cup?", ["yes"] * 10),
                ("Is it red?", ["no"] * 6 + ["yes"] * 4),
                ("How many cups?", ["2"] * 3 + ["3"] * 7),
            )
        ):
            question_id = 10 * image_id + number
            questions.append({"image_id": image_id, "question": text, "question_id": question_id})
            annotations.append(
                {
                    "question_id": question_id,
                    "image_id": image_id,
                    "question_type": "how many" if number == 2 else "is",
                    "answer_type": "number" if number == 2 else "yes/no",
                    "multiple_choice_answer": answers[0],
                    "answers": [
                        {"answer": x, "answer_confidence": "yes", "answer_id": i}
                        for i, x in enumerate(answers, start=1)
                    ],
                }
            )
    paths = (
        root / folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        root / folder / "v2_mscoco_val2014_annotations.json",
    )
    write_json(paths[0], {"questions": questions})
    write_json(paths[1], {"annotations": annotations[::-1]})  # matched by id, not by place
    return paths


def write_pope(root: Path, folder: str = "pope") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for category in ("random", "popular", "adversarial"):
        lines = [
            json.dumps(
                {
                    "question_id": number,
                    "image": coco_name(number // 2),
                    "text": f"Is there a {category} {number} in the image?",
                    "label": "no" if number % 2 else "yes",
                }
            )
            for number in range(2 * NUM_PICTURES)
        ]
        (root / folder / f"coco_pope_{category}.json").write_text("\n".join(lines))


def write_mme(root: Path, subtasks, split_folders=("posters",)) -> None:
    for subtask in subtasks:
        texts = pictures = root / "mme" / subtask
        if subtask in split_folders:
            texts, pictures = texts / "questions_answers_YN", pictures / "images"
        texts.mkdir(parents=True)
        ending = "png" if "_" in subtask else "jpg"
        save_pictures(pictures, [f"{number}.{ending}" for number in range(2)])
        for number in range(2):
            (texts / f"{number}.txt").write_text(
                f"Is it {subtask} {number}? Please answer yes or no.\tYes\n"
                f"Is it not {subtask}? Please answer yes or no.\tNo\n"
            )
