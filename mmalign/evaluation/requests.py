"""Log-likelihood requests as tokens, split as lm-evaluation-harness splits them.

As in September 2023 (lm_eval/base.py at 00209e10f), context and continuation are tokenised together
and split at the length of the context's own ids, without BOS.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmalign.errors import UserError

Request = tuple[str, str]  # (context, continuation)


class TextEncoder(Protocol):
    """What requests need of a tokenizer."""

    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class EncodedRequest:
    input_ids: np.ndarray  # (num_inputs,) int32: all tokens but the last
    target_ids: np.ndarray  # (num_tokens,) int32: the continuation
    num_truncated: int  # tokens removed from the left of the context


class RequestEncoder:
    def __init__(self, tokenizer: TextEncoder, max_length: int, vocab_size: int):
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self._last_context: tuple[str, list[int]] = ("", [])  # choices of a document share it

    def encode(self, context: str, continuation: str, name: str) -> EncodedRequest:
        """The model's input and targets; at most max_length inputs, truncated on the left."""
        if not continuation:
            raise UserError(f"{name}: the continuation is empty; remove the document from its file")
        context_ids, target_ids = self._split(context, continuation)
        if not context_ids:
            raise UserError(
                f"{name}: the tokenizer gives no token for the context {context!r}; check that the "
                "tokenizer is the model's"
            )
        if not 0 < len(target_ids) <= self.max_length:
            raise UserError(
                f"{name}: the continuation {continuation[:60]!r} is {len(target_ids)} tokens "
                f"after its context; expected 1 to {self.max_length} (the model's context). Remove "
                "the document or use a model with a longer context"
            )
        ids = np.array(context_ids + target_ids, dtype=np.int32)
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{name}: the tokenizer gives id {ids.max()}, but the model's vocabulary has "
                f"{self.vocab_size} entries; use the tokenizer that belongs to the model"
            )
        num_truncated = max(0, len(ids) - (self.max_length + 1))
        return EncodedRequest(ids[num_truncated:-1], ids[-len(target_ids) :], num_truncated)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        # white space at the boundary goes to the continuation, whose first token includes it
        continuation = context[len(stripped) :] + continuation
        if not stripped:  # the harness replaces an empty context by one end-of-text token
            return [self.tokenizer.eos_token_id], self.tokenizer.encode(continuation)
        if self._last_context[0] != stripped:
            self._last_context = (stripped, self.tokenizer.encode(stripped))
        context_ids = self._last_context[1]
        return context_ids, self.tokenizer.encode(stripped + continuation)[len(context_ids) :]
