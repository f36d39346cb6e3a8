"""Log-likelihood requests as tokens, split as lm-evaluation-harness splits them.

As in September 2023 (lm_eval/base.py at 00209e10f), context and continuation are tokenised together
and split at the length of the context's own ids, without BOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmalign.errors import UserError

Request = tuple[str, str]  # (context, continuation)


class TextEncoder(Protocol):
    """What requests need of a tokenizer."""

    eos_token_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class EncodedRequest:
    input_ids: np.ndarray  # (num_inputs,) int32: all tokens but the last
    target_ids: np.ndarray  # (num_tokens,) int32: the continuation
    num_truncated: int  # tokens removed from the left of the context


class RequestEncoder:
    def __init__(self, tokenizer: TextEncoder, max_length: int, vocab_size: int):
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size

    def encode(self, requests: Sequence[Request], names: Sequence[str]) -> list[EncodedRequest]:
        """Model inputs and targets; at most max_length inputs, truncated on the left."""
        for name, (_, continuation) in zip(names, requests, strict=True):
            if not continuation:
                message = "the continuation is empty; remove the document from its file"
                raise UserError(f"{name}: {message}")
        pairs = [_move_white_space(*request) for request in requests]
        texts = dict.fromkeys(context for context, _ in pairs if context)  # choices share theirs
        texts |= dict.fromkeys(context + continuation for context, continuation in pairs)
        # one call: the tokenizer spreads it over the cores
        ids_of = dict(zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True))
        return [
            self._encoded(context, continuation, ids_of, name)
            for name, (context, continuation) in zip(names, pairs, strict=True)
        ]

    def _encoded(
        self, context: str, continuation: str, ids_of: dict[str, list[int]], name: str
    ) -> EncodedRequest:
        # the harness replaces an empty context by one end-of-text token
        context_ids = ids_of[context] if context else [self.tokenizer.eos_token_id]
        target_ids = ids_of[context + continuation][len(context_ids) if context else 0 :]
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


def _move_white_space(context: str, continuation: str) -> Request:
    """White space at the boundary goes to the continuation, whose first token includes it."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
