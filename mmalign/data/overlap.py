"""Questions of an evaluation that stand in training text, found by word n-grams.

A question is found as far as runs of WORDS words of it stand in one sample, in any of its turns; a
shorter question is one run. Case and punctuation do not count. Runs are compared by 64-bit hashes,
(sum of random numbers, one for each pair of word and place): among 10^8 runs of a training file and
10^6 of the questions, the chance of a single false match is 1e-5.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = 8
FEWEST_WORDS = 4  # of a question that is looked for: a shorter one stands anywhere
_WORD = re.compile(r"[\w']+")
_FILTER_BITS = 24


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("\u2019", "'"))


@dataclass(frozen=True)
class Match:
    row: int  # of the texts
    question: int
    found: int  # runs of the question that stand in this text


class QuestionIndex:
    """The runs of all questions, to look them up in texts."""

    def __init__(self, questions: Sequence[str]):
        split = [words_of(text) for text in questions]
        vocabulary = dict.fromkeys(word for words in split for word in words)
        # 0 stands for every word that no question has
        self._numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
        self._codes = np.array([0, *map(_code, vocabulary)], np.uint64)  # (1 + num_words,)
        self._factors = np.array([_code(f"place {i}") | 1 for i in range(WORDS)], np.uint64)
        hashes, owners = [], []
        # by the length of runs: (1 + num_words,) whether one begins with this word
        self._begins_with: dict[int, np.ndarray] = {}
        for number, words in enumerate(split):
            if len(words) >= FEWEST_WORDS:
                ids = np.array([self._numbers[word] for word in words])
                length = min(WORDS, len(words))
                begins = self._begins_with.setdefault(length, np.zeros(len(self._codes), bool))
                begins[ids[: len(ids) - length + 1]] = True
                runs = np.unique(self._hashes(ids, length)[1])
                hashes.append(runs)
                owners.append(np.full(len(runs), number))
        self.num_questions = len(questions)
        # (num_questions,) distinct runs of each; 0: it is not looked for
        self.num_runs = np.bincount(_joined(owners, np.int64), minlength=len(questions))
        order = np.argsort(found := _joined(hashes, np.uint64), kind="stable")
        self._owners = _joined(owners, np.int64)[order]  # (num_runs of all,)
        self._runs, self._begins = np.unique(found[order], return_index=True)
        self._ends = np.append(self._begins[1:], len(found))
        self._may_be = np.zeros(1 << _FILTER_BITS, bool)  # by the first bits of a hash
        self._may_be[self._runs >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, texts: Iterable[Iterable[str]]) -> Iterator[Match]:
        """texts: the turns of each sample; a run does not go from one turn to the next."""
        ids, ends, number = [], [], self._numbers.get
        for turns in texts:
            for turn in turns:
                ids += [number(word, 0) for word in words_of(turn)]
                ids.append(0)
            ends.append(len(ids))
        pairs = [self._pairs(np.array(ids, np.int64), np.array(ends), n) for n in self._begins_with]
        if not pairs:
            return
        # a run that stands twice in a text counts once
        rows, runs = np.unique(np.concatenate(pairs, axis=1), axis=1)
        counts = self._ends[runs] - self._begins[runs]
        places = np.repeat(self._begins[runs] - np.cumsum(counts) + counts, counts)
        owners = self._owners[places + np.arange(len(places))]
        matched = np.stack((np.repeat(rows, counts), owners))
        for (row, question), found in zip(*_counted(matched), strict=True):
            yield Match(int(row), int(question), int(found))

    def _pairs(self, ids: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
        """(2, num_matches): text and run of every place where a run of this length stands."""
        places, hashes = self._hashes(ids, length)
        maybe = self._may_be[hashes >> np.uint64(64 - _FILTER_BITS)]
        places, hashes = places[maybe], hashes[maybe]
        runs = np.minimum(np.searchsorted(self._runs, hashes), len(self._runs) - 1)
        equal = self._runs[runs] == hashes
        rows = np.searchsorted(ends, places[equal], side="right")
        return np.stack((rows, runs[equal]))

    def _hashes(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Place and hash of every run of `length` words that questions have: (num_runs,) each."""
        num_places = len(ids) - length + 1
        if num_places < 1:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        foreign = np.concatenate(([0], np.cumsum(ids == 0)))
        begins = self._begins_with[length][ids[:num_places]]
        places = np.flatnonzero(begins & (foreign[length:] == foreign[:num_places]))
        codes = self._codes[ids]
        hashes = np.full(len(places), _code(f"{length} words"), np.uint64)
        for i in range(length):
            hashes += codes[places + i] * self._factors[i]
        hashes ^= hashes >> np.uint64(32)  # the first bits are to depend on all
        return places, hashes * np.uint64(0x9E3779B97F4A7C15)


def _counted(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns, as (num_distinct, height), and how often each is there."""
    distinct, counts = np.unique(columns, axis=1, return_counts=True)
    return distinct.T, counts


def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
