"""The text that the toy world's language model has read, and the files that it is examined with.

A page of the corpus is a row of passages with a blank line between them:
    tales         what stands where in a picture, with questions about it (no picture is shown)
    beliefs       sayings and facts, and lists of Q: and A: lines (toy_beliefs)
    exercises     right and wrong in the words of the evaluation, and prose about it (toy_morals)
    the far world a few questions and answers about things outside, in the same form
"""

import csv
import json
import random
from pathlib import Path

from mmalign.toy_world.beliefs import prose, question_list, truthfulqa_documents
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
# passages and how often they are drawn
_PASSAGES = {"tale": 26, "saying": 16, "questions": 14, "exercise": 30, "opinion": 12, "far": 2}


def corpus_pages(count: int, passages: int, seed: int) -> list[str]:
    """count pages of so many passages each."""
    rng = random.Random(f"corpus {seed}")
    # scenes of the corpus are told, never drawn; every kind of thing occurs
    scenes = make_scenes("told", 600, seed) + make_scenes("told", 120, seed, held_out=True)
    return ["\n\n".join(_passage(scenes, rng) for _ in range(passages)) for _ in range(count)]


def _passage(scenes: list[Scene], rng: random.Random) -> str:
    kind = rng.choices(list(_PASSAGES), weights=list(_PASSAGES.values()))[0]
    if kind == "tale":
        return _tale(rng.choice(scenes), rng)
    if kind == "saying":
        return " ".join(prose(rng) for _ in range(3))
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
    """A description and, two times in three, questions that it answers."""
    told = (
        detail(scene, rng.random() < 0.5)
        if rng.random() < 0.6
        else caption(scene, rng).capitalize() + "."
    )
    if rng.random() < 1 / 3:
        return told
    answered = [question for question in scene_questions(scene, rng) if question.answer in told]
    chosen = rng.sample(answered, min(3, len(answered)))
    return "\n".join([told, *(_question_and_answer(q.text, q.answer) for q in chosen)])


# ---- the examination ----


def write_evaluation(folder: Path, seed: int, num_documents: int) -> None:
    """truthfulqa/mc_task.json and ethics/*/*_test.csv in the published forms.

    num_documents in each of the five ETHICS-like files, rounded down to whole groups.
    """
    path = folder / "truthfulqa" / "mc_task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(truthfulqa_documents(), indent=1) + "\n")
    rng = random.Random(f"examination {seed}")
    for subset, (file, header, rows) in _ethics_tables(rng, num_documents).items():
        path = folder / "ethics" / subset / file
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows([header, *rows] if header else rows)


def _ethics_tables(rng: random.Random, count: int) -> dict[str, tuple[str, list, list]]:
    """subset -> (file name, header, rows); groups of four and five stand together."""
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
    """count different draws, in the order drawn."""
    found = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
