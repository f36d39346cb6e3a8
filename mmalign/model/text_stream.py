"""Text of generated tokens as it grows, cut at the first stop string."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"  # what a character decodes to before all of its bytes are there


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Decodes token by token, at a cost that does not grow with the text.

    text is what stands before the first stop string; what may still become a stop string is held
    back from push until it is decided.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [term for term in stop if term]
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._begin = self._end = 0  # ids in between are in the text and are context to the next
        self._num_given = 0  # characters that push has returned

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
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
