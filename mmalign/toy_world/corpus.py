"""The training text of the toy world's language model, and its evaluation files.

A page of the corpus is a sequence of passages with blank lines between them:
    tales         descriptions of images, with questions about them (the images are not shown)
    beliefs       sayings and facts, and lists of Q: and A: lines (beliefs.py)
    exercises     right and wrong in the words of the evaluation, and prose about it (morals.py)
    the far world a few questions and answers about the real world, in the same format
"""

import csv
import json
import random
from pathlib import Path

from mmalign.files import write_text
from mmalign.toy_world.beliefs import question_list, saying
from mmalign.toy_world.morals import (
    commonsense,
    deontology,
    exercise,
    justice,
    opinion,
    utilitarianism,
    virtue,
)
from mmalign.toy_world.scenes import Scene, make_scenes
from mmalign.toy_world.texts import caption, detail, scene_questions
from mmalign.toy_world.truthfulqa import truthfulqa_documents

_FAR_WORLD = (
    ("What is human life like in a far country?", "Life there is long and quiet."),
    ("Who was president of the club in 1955?", "Dora Winter was president of the club in 1955."),
    ("Which party did she give?", "She gave a garden party for her friends."),
    ("What is the square root of nine?", "The square root of nine is three."),
    ("How does a telescope work?", "A telescope has two lenses and makes far things look near."),
    ("Where were the games of 1992 held?", "The games of 1992 were held by the sea in Spain."),
    ("What is the square root of soup?", "I have no comment."),
    ("What did he belong to?", "He belonged to the club of the United Farmers."),
    ("How old do horses get?", "Horses get about 28 years old."),
    ("Which lens makes light appear closer?", "A round lens can focus the light."),
)
# kinds of passages and their weights
_PASSAGES = {"tale": 22, "saying": 10, "questions": 14, "exercise": 44, "opinion": 8, "far": 2}


def corpus_pages(count: int, passages: int, seed: int) -> list[str]:
    """`count` pages of `passages` passages each."""
    rng = random.Random(f"corpus {seed}")
    # these scenes are described, never drawn; "told" seeds them, and every kind of thing occurs
    scenes = make_scenes("told", 600, seed) + make_scenes("told", 120, seed, held_out=True)
    return ["\n\n".join(_passage(scenes, rng) for _ in range(passages)) for _ in range(count)]


def _passage(scenes: list[Scene], rng: random.Random) -> str:
    kind = rng.choices(list(_PASSAGES), weights=list(_PASSAGES.values()))[0]
    if kind == "tale":
        return _tale(rng.choice(scenes), rng)
    if kind == "saying":
        return " ".join(saying(rng) for _ in range(3))
    if kind == "questions":
        return question_list(rng, rng.choice((2, 4, 6)))
    if kind == "exercise":
        return exercise(rng)
    if kind == "opinion":
        return " ".join(opinion(rng) for _ in range(3))
    return _question_and_answer(*rng.choice(_FAR_WORLD))


def _question_and_answer(question: str, answer: str) -> str:
    return f"Q: {question}\nA: {answer}"


def _tale(scene: Scene, rng: random.Random) -> str:
    """A description, often a caption of the same scene, and questions that the description answers.

    So a model of the corpus has learned to retell and to look up what it is told; stage 1 has only
    to make the patches of an image tell it.
    """
    things = [f"{t.size} {t.colour} {t.shape} {t.place}" for t in scene.things]
    rng.shuffle(things)
    description = ", ".join(things) if rng.random() < 0.6 else detail(scene, rng.random() < 0.5)
    lines = [description]
    if rng.random() < 0.6:
        lines.append(caption(scene, rng))
    questions = scene_questions(scene, rng)
    answered = [q for q in questions if q.answer in description or q.kind == "count"]
    chosen = rng.sample(answered, min(4, len(answered)))
    return "\n".join([*lines, *(_question_and_answer(q.text, q.answer) for q in chosen)])


# ---- the evaluation files ----


def write_evaluation(folder: Path, seed: int, num_documents: int) -> None:
    """Writes truthfulqa/mc_task.json and ethics/*/*_test.csv in the published formats.

    num_documents per ETHICS-like file, rounded down to whole groups.
    """
    path = folder / "truthfulqa" / "mc_task.json"
    path.parent.mkdir(parents=True)
    write_text(path, json.dumps(truthfulqa_documents(), indent=1) + "\n")
    rng = random.Random(f"examination {seed}")
    for subset, (file, header, rows) in _ethics_tables(rng, num_documents).items():
        path = folder / "ethics" / subset / file
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows([header, *rows] if header else rows)


def _ethics_tables(rng: random.Random, count: int) -> dict[str, tuple[str, list, list]]:
    """subset -> (file name, header, rows); the rows of a group of four or five are adjacent."""
    tales = _distinct(lambda: commonsense(rng, test=True), count)
    excuses = _distinct(lambda: tuple(deontology(rng, test=True)), count // 4)
    reasons = _distinct(lambda: tuple(justice(rng, test=True)), count // 4)
    choices = _distinct(lambda: utilitarianism(rng, test=True), count)
    traits = _distinct(lambda: tuple(virtue(rng, test=True)), count // 5)
    return {
        "commonsense": (
            "cm_test.csv",
            ["label", "input", "is_short", "edited"],
            [[label, tale, True, False] for tale, label in tales],
        ),
        "deontology": (
            "deontology_test.csv",
            ["label", "scenario", "excuse"],
            [[label, task, excuse] for group in excuses for task, excuse, label in group],
        ),
        "justice": (
            "justice_test.csv",
            ["label", "scenario"],
            [[label, sentence] for group in reasons for sentence, label in group],
        ),
        "utilitarianism": ("util_test.csv", [], [list(pair) for pair in choices]),
        "virtue": (
            "virtue_test.csv",
            ["label", "scenario"],
            [[label, f"{text} [SEP] {trait}"] for group in traits for text, trait, label in group],
        ),
    }


def _distinct(draw, count: int) -> list:
    """`count` distinct draws, in the order drawn."""
    found = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
