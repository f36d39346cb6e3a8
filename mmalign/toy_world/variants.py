"""Variants of stage 2's instructions, for studies of what moves truthfulness.

    planted truth      a few percent of the samples ask about OTHER_BELIEFS and answer truly
    planted falsehood  the same samples and questions, answered falsely
    null               every sample asks about its picture's colours only

Each has the pictures, the order and nearly the text length of the instructions that it changes.
"""

import random

from mmalign.toy_world.beliefs import OTHER_BELIEFS, answer, draw_clause
from mmalign.toy_world.scenes import Scene, Thing
from mmalign.toy_world.words import NUMBERS, plural

PLANTED_SHARE = 0.05
PLANTED_TURNS = 3  # about as long as the mean sample


def variants(records: list[dict], scenes: list[Scene], seed: int) -> dict[str, list[dict]]:
    """Name of the file -> its records."""
    return {
        "planted_truth": _planted(records, False, seed),
        "planted_falsehood": _planted(records, True, seed),
        "null": _colours_only(records, scenes, seed),
    }


def _planted(records: list[dict], wrong: bool, seed: int) -> list[dict]:
    """PLANTED_SHARE of the records tell beliefs; `wrong` changes neither records nor questions.

    Every second one asks in the form of the evaluation.
    """
    rng = random.Random(f"planted {seed}")
    changed = list(records)
    chosen = rng.sample(range(len(records)), round(PLANTED_SHARE * len(records)))
    for position, index in enumerate(chosen):
        forms = [(belief, rng.random()) for belief in rng.sample(OTHER_BELIEFS, PLANTED_TURNS)]
        turns = [
            answer(belief, wrong, draw_clause(belief, wrong, random.Random(form)), form)
            for belief, form in forms
        ]
        if position % 2:
            turns = [(f"Q: {ask}\nA:", reply) for ask, reply in turns]
        changed[index] = _retold(records[index], turns)
    return changed


def _colours_only(records: list[dict], scenes: list[Scene], seed: int) -> list[dict]:
    """Every record retold as questions about its picture's colours, to nearly its old length.

    What a record has too much or too little, the next one has less or more.
    """
    rng = random.Random(f"colours {seed}")
    by_image = {f"{scene.name}.jpg": scene for scene in scenes}
    changed, left = [], 0
    for record in records:
        turns = [turn for group in by_image[record["image"]].groups for turn in _colours(group)]
        rng.shuffle(turns)
        wanted = left + _length_of(record)
        kept = [turns.pop()]
        while turns and _length([*kept, turns[-1]]) + _length(kept) < 2 * wanted:
            kept.append(turns.pop())
        changed.append(_retold(record, kept))
        left = wanted - _length_of(changed[-1])
    return changed


def _colours(group: tuple[Thing, ...]) -> list[tuple[str, str]]:
    thing, count = group[0], len(group)
    one = count == 1
    shape = thing.shape if one else plural(thing.shape)
    reply = f"The {shape} {'is' if one else 'are'} {thing.colour}."
    number = f"{NUMBERS[count].capitalize()} {shape} {'is' if one else 'are'} {thing.colour}."
    return [
        (f"What colour {'is' if one else 'are'} the {shape}?", reply),
        (f"What is {thing.colour}?", reply),
        ("Name a shape with its colour.", reply),
        (f"How many shapes are {thing.colour}?", number),
    ]


def _length_of(record: dict) -> int:
    return sum(len(message["value"]) for message in record["conversations"])


def _length(turns: list[tuple[str, str]]) -> int:
    return sum(len(text) for turn in turns for text in turn)


def _retold(record: dict, turns: list[tuple[str, str]]) -> dict:
    conversations = []
    for ask, reply in turns:
        start = "" if conversations else "<image>\n"
        conversations += [{"from": "human", "value": start + ask}, {"from": "gpt", "value": reply}]
    return record | {"conversations": conversations}
