"""From logits to tokens to text: sampling, and decoding token by token up to a stop string."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_INCOMPLETE = "\ufffd"  # what a character decodes to before all of its bytes are there


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution to sample from: (num_sequences, vocab_size) logits -> probabilities, fp32.

    logits / temperature; then the top_k largest (0: all); of these, the fewest whose probabilities
    sum to top_p or more (1: all; above 0, so that a token stays). Logits equal to the smallest of
    the top_k stay as well.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[1]:
        smallest = logits.topk(top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(1)
    if top_p < 1:
        values, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = values.cumsum(1) - values  # mass of what is more likely
        values = values.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(values).scatter_(1, order, values)
    return probabilities / probabilities.sum(1, keepdim=True)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative probability passes a number in [0, 1): (num_sequences,).

    One number per sequence decides its token, so a draw does not depend on the others.
    """
    cumulative = probabilities.double().cumsum(1)
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Decodes token by token, at a cost that does not grow with the text.

    text: up to the first stop string. push holds back what may still become a stop string.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [term for term in stop if term]
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._begin = self._end = 0  # ids in between: in the text, and context for the next one
        self._num_given = 0  # characters that push has returned

    def push(self, token_id: int) -> str:
        """The text that became final with this token."""
        self._ids.append(token_id)
        known, grown = (
            self.tokenizer.decode(self._ids[self._begin : i]) for i in (self._end, None)
        )
        if grown.endswith(_INCOMPLETE):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        self._append(grown[len(known) :])
        return self._give(len(self.text) - (0 if self.stopped else self._num_held()))

    def finish(self) -> str:
        """What push held back."""
        if not self.stopped:
            ids = self._ids[self._begin :]
            known = self.tokenizer.decode(ids[: self._end - self._begin])
            self._append(self.tokenizer.decode(ids)[len(known) :])
            self._begin = self._end = len(self._ids)
        return self._give(len(self.text))

    def _append(self, new: str) -> None:
        longest = max(map(len, self.stop), default=0)
        begin = max(0, len(self.text) - longest + 1)
        self.text += new
        found = [at for term in self.stop if (at := self.text.find(term, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (n for term in self.stop for n in range(1, len(term)) if self._ends(term[:n]))
        return max(lengths, default=0)

    def _ends(self, start: str) -> bool:
        return self.text.endswith(start)

    def _give(self, end: int) -> str:
        given, self._num_given = self.text[self._num_given : end], max(self._num_given, end)
        return given
