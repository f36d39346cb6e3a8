"""CIDEr-D (Vedantam et al. 2015) as pycocoevalcap (ad63453) computes it, on a scale of 0 to 10.

Papers print it times 100. An n-gram weighs less the more images have it in a reference, so a score
depends on the set of images whose references are counted: here it is fixed, whichever of the
images are scored.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, sqrt

_LONGEST = 4  # words in an n-gram
_SIGMA = 6.0  # of the penalty for another length
NGrams = dict[tuple[str, ...], int]


class Cider:
    def __init__(self, references: Sequence[Sequence[str]]):
        """references: of every image, at least one caption each, as ptb_tokens writes them."""
        self.references = references
        self._last: tuple[int, list[_Weighted]] = (-1, [])  # image, its references

    @cached_property
    def most_common(self) -> str:
        """The caption that stands most often among the references."""
        return Counter(x for captions in self.references for x in captions).most_common(1)[0][0]

    @cached_property
    def _num_images(self) -> Counter[tuple[str, ...]]:
        """In how many images an n-gram occurs."""
        found: Counter[tuple[str, ...]] = Counter()
        for captions in self.references:
            found.update({ngram for caption in captions for ngram in _count(caption)})
        return found

    def score(self, image: int, caption: str) -> float:
        """Of one caption, in tokens, for the image with this index: 0 to 10."""
        if self._last[0] != image:
            self._last = image, [self._weigh(x) for x in self.references[image]]
        hypothesis, lines = self._weigh(caption), self._last[1]
        return sum(_similarity(hypothesis, x) for x in lines) * 10 / len(lines)

    def _weigh(self, caption: str) -> "_Weighted":
        most, by_length = log(len(self.references)), [{} for _ in range(_LONGEST)]
        counts = _count(caption)
        for ngram, count in counts.items():
            idf = most - log(max(1, self._num_images[ngram]))
            by_length[len(ngram) - 1][ngram] = count * idf
        norms = [sqrt(sum(x * x for x in weights.values())) for weights in by_length]
        num_bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Weighted(by_length, norms, num_bigrams)


@dataclass(frozen=True)
class _Weighted:
    by_length: list[dict[tuple[str, ...], float]]  # weight of every n-gram, n from 1 to _LONGEST
    norms: list[float]
    num_bigrams: int  # the length that the penalty compares


def _similarity(hypothesis: _Weighted, reference: _Weighted) -> float:
    """0 to 1: mean over the lengths of n-grams of a clipped cosine."""
    total = 0.0
    for n in range(_LONGEST):
        norm = hypothesis.norms[n] * reference.norms[n]
        if norm:
            other = reference.by_length[n]
            pairs = ((x, other.get(ngram, 0.0)) for ngram, x in hypothesis.by_length[n].items())
            total += sum(min(x, y) * y for x, y in pairs) / norm
    difference = hypothesis.num_bigrams - reference.num_bigrams
    return total / _LONGEST * exp(-(difference**2) / (2 * _SIGMA**2))


def _count(caption: str) -> NGrams:
    words = caption.split()
    return Counter(
        tuple(words[at : at + n])
        for n in range(1, _LONGEST + 1)
        for at in range(len(words) - n + 1)
    )
