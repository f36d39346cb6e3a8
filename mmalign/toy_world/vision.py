"""Captions and existence questions: samples of stage 2, and test files about held-out scenes.

The test files are in the published formats of COCO's captions and of POPE, and evaluate.py asks
with the published prompts; stage 2 has samples with the same prompts, so that a small model knows
what is wanted. A corruption of the pictures (evaluation/corruptions.py) leaves the truth as it is.
"""

import json
import random
from collections import Counter
from pathlib import Path

from mmalign.files import write_text
from mmalign.toy_world.scenes import SHAPES, Scene, save_jpeg
from mmalign.toy_world.texts import caption, existence_question, is_there, record

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
POPE_CATEGORIES = ("random", "popular", "adversarial")
EXISTENCE_TURNS = 2
CAPTION_DRAWS = 12  # finds nearly all of a scene's two to four captions


def vision_records(scenes: list[Scene], seed: int) -> list[dict]:
    """Stage 2: of every fourth scene a caption, of every eighth existence questions.

    Yes and no are right equally often, whatever the turn. The toy world's models learn the form of
    these answers alone, even from existence questions only: to compare what is asked for with what
    is shown takes more than two layers and some hundred steps.
    """
    rng = random.Random(f"existence {seed}")
    records = []
    for scene in scenes[::8]:
        asked = [existence_question(scene, rng, short=i == 0) for i in range(EXISTENCE_TURNS)]
        turns = [(question.text, question.answer) for question in asked]
        records.append(record(f"existence_{scene.name}", scene, turns, "existence"))
    for scene in scenes[::4]:
        turns = [(CAPTION_PROMPT, caption(scene, rng))]
        records.append(record(f"one_sentence_{scene.name}", scene, turns, "caption"))
    return records


# ---- test files ----


def write_vision_evaluation(folder: Path, scenes: list[Scene], seed: int) -> None:
    """Writes coco/captions_val2014.json, coco/val2014/*.jpg and pope/coco_pope_*.json."""
    pictures = folder / "coco" / "val2014"
    pictures.mkdir(parents=True)
    for scene in scenes:
        save_jpeg(scene, pictures)
    content = json.dumps(coco_captions(scenes, seed), indent=1)
    write_text(folder / "coco" / "captions_val2014.json", content + "\n")
    (folder / "pope").mkdir()
    for category, rows in pope_questions(scenes, seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(folder / "pope" / f"coco_pope_{category}.json", lines)


def coco_captions(scenes: list[Scene], seed: int) -> dict:
    """As COCO's captions_val2014.json: all different captions that a scene may have."""
    rng = random.Random(f"references {seed}")
    images, annotations = [], []
    for image_id, scene in enumerate(scenes):
        images.append({"id": image_id, "file_name": f"{scene.name}.jpg"})
        for text in dict.fromkeys(caption(scene, rng) for _ in range(CAPTION_DRAWS)):
            about = {"id": len(annotations), "image_id": image_id, "caption": text}
            annotations.append(about)
    return {"images": images, "annotations": annotations}


def pope_questions(scenes: list[Scene], seed: int) -> dict[str, list[dict]]:
    """Category -> its lines: of every scene each shape that is there and as many that are not.

    The absent ones are drawn (random), the most frequent of all scenes (popular), or those that
    stand most often beside the present ones (adversarial), as in arXiv 2305.10355.
    """
    rng = random.Random(f"absent {seed}")
    frequency = Counter(shape for scene in scenes for shape in _shapes(scene))
    beside = Counter((a, b) for scene in scenes for a in _shapes(scene) for b in _shapes(scene))
    found = {category: [] for category in POPE_CATEGORIES}
    for scene in scenes:
        present = _shapes(scene)
        absent = [shape for shape in SHAPES if shape not in present]
        drawn = rng.sample(absent, len(absent))
        popular = sorted(drawn, key=lambda shape: -frequency[shape])
        adversarial = sorted(drawn, key=lambda x: -sum(beside[there, x] for there in present))
        orders = zip(POPE_CATEGORIES, (drawn, popular, adversarial), strict=True)
        for category, order in orders:
            pairs = zip(present, order, strict=False)
            found[category] += [_line(scene, *answer) for pair in pairs for answer in _both(*pair)]
    for rows in found.values():
        for number, row in enumerate(rows, start=1):
            row["question_id"] = number
    return found


def _both(present: str, absent: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (present, "yes"), (absent, "no")


def _line(scene: Scene, shape: str, label: str) -> dict:
    asked = {"text": is_there(shape), "label": label}
    return {"question_id": 0, "image": f"{scene.name}.jpg"} | asked


def _shapes(scene: Scene) -> list[str]:
    return [group[0].shape for group in scene.groups]
