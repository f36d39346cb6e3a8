"""Controls of answers: another sample's, short ones, or nothing but them."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mmalign.data.controls.control import Controlled, Records, Source, require_pairs
from mmalign.data.controls.pictures import deranged
from mmalign.data.samples import type_of
from mmalign.data.templates import IMAGE
from mmalign.errors import UserError

MOST_WORDS = 10  # of an answer that short-answers keeps: a word, a phrase or a short sentence


def permute_answers(source: Source) -> Controlled:
    groups = defaultdict(list)  # (type, position of the answer) -> its samples
    for i, sample in enumerate(source.samples):
        require_pairs(sample)
        for turn in range(1, len(sample.conversations), 2):
            groups[type_of(source.records[i]), turn].append(i)
    turns = [[dict(turn) for turn in row["conversations"]] for row in source.records]
    alone = 0
    for (_, turn), members in groups.items():
        given = deranged(np.arange(len(members)), source.random)
        for i, j in zip(members, given, strict=True):
            turns[i][turn]["value"] = source.records[members[j]]["conversations"][turn]["value"]
        alone += len(members) == 1
    about = {"answers": sum(map(len, groups.values())), "unchanged": alone}
    return Controlled(_with_turns(source.records, turns), about)


def _with_turns(rows: Records, turns: Sequence[list[dict]]) -> list[dict]:
    return [row | {"conversations": x} for row, x in zip(rows, turns, strict=True)]


def plain_text(source: Source) -> Controlled:
    """One answer per sample, for template plain, which takes a single turn."""
    turns = []
    for sample in source.samples:
        require_pairs(sample)
        answers = [turn.text for turn in sample.conversations[1::2]]
        turns.append([_turn("human", ""), _turn("gpt", "\n".join(answers))])
    rows = [{k: x for k, x in row.items() if k != "image"} for row in source.records]
    return Controlled(_with_turns(rows, turns), {"samples": len(rows)})


def _turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def short_answers(source: Source) -> Controlled:
    rows, places, num_turns, num_kept = [], [], 0, 0
    for i, (row, sample) in enumerate(zip(source.records, source.samples, strict=True)):
        turns = row["conversations"]
        require_pairs(sample)
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        kept = [pair for pair in pairs if len(pair[1]["value"].split()) <= MOST_WORDS]
        num_turns, num_kept = num_turns + len(pairs), num_kept + len(kept)
        if kept:
            num_shown = sum(question["value"].count(IMAGE) for question, _ in kept)
            if num_shown < len(sample.images):  # one was shown in a turn that is left out
                kept = _images_first(kept, len(sample.images))
            rows.append(row | {"conversations": [turn for pair in kept for turn in pair]})
            places.append(i)
    if not rows:
        raise UserError(
            f"none of the {num_turns:,} answers has at most {MOST_WORDS} words, so short-answers "
            "leaves nothing. Take a file with short answers"
        )
    about = {"turns": num_turns, "turns_kept": num_kept, "samples_kept": len(rows)}
    return Controlled(rows, about | {"most_words": MOST_WORDS}, places)


def _images_first(pairs: list[tuple[dict, dict]], num_images: int) -> list[tuple[dict, dict]]:
    """All images before the first question, where their order stays."""
    questions = [question["value"].replace(IMAGE, "").strip() for question, _ in pairs]
    questions[0] = f"{IMAGE}\n" * num_images + questions[0]
    return [
        (question | {"value": text}, answer)
        for (question, answer), text in zip(pairs, questions, strict=True)
    ]
