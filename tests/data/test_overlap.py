"""Runs of words against Python's sets of tuples."""

import re

import numpy as np
import pytest

from mmalign.data.overlap import FEWEST_WORDS, WORDS, QuestionIndex

VOCABULARY = ("a", "b", "c", "don't", "é")


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def counted(questions: list[str], texts: list[list[str]]) -> dict[tuple[int, int], int]:
    """What `find` should say: text and question -> runs of the question in the text."""
    found = {}
    for number, question in enumerate(questions):
        length = min(WORDS, len(re.findall(r"[\w']+", question)))
        if length < FEWEST_WORDS:
            continue
        for row, turns in enumerate(texts):
            stand = set().union(*(runs(turn, length) for turn in turns)) if turns else set()
            if common := runs(question, length) & stand:
                found[row, number] = len(common)
    return found


def drawn(rng: np.random.Generator, most: int, words: tuple[str, ...]) -> str:
    return " ".join(rng.choice(words, rng.integers(0, most)))


@pytest.mark.parametrize("seed", range(20))
def test_every_run_is_found_and_no_other(seed):
    rng = np.random.default_rng(seed)
    questions = [drawn(rng, 14, VOCABULARY[: rng.integers(1, 5)]) for _ in range(30)]
    questions.append(questions[0])  # another task may ask the same
    texts = [
        [drawn(rng, 60, (*VOCABULARY, "foreign")) for _ in range(rng.integers(0, 4))]
        for _ in range(20)
    ]
    texts[3].append(f"foreign {questions[1]} foreign")
    found = {(x.row, x.question): x.found for x in QuestionIndex(questions).find(texts)}
    assert found == counted(questions, texts) and found


def test_case_punctuation_and_apostrophes_do_not_count():
    index = QuestionIndex(["What's the colour of the sky?"])
    texts = [["Well: WHAT’S the colour -- of the SKY"], ["What's the colour of", "the sky"], []]
    assert [(x.row, x.found) for x in index.find(texts)] == [(0, 1)]


@pytest.mark.parametrize("questions", [[], ["Why me?"]])
def test_nothing_to_look_for(questions):
    assert list(QuestionIndex(questions).find([["why me"]])) == []
