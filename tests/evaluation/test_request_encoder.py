"""Requests as tokens: the ids that one call per text gives, split as the harness splits them."""

import pytest

from mmalign.errors import UserError
from mmalign.evaluation.requests import RequestEncoder
from mmalign.evaluation.tasks import load_documents, resolve_tasks

ODD = [
    ("", "a continuation alone"),
    ("  ", "white space is no context"),
    ("The answer is ", "in the continuation"),
    ("The answer is\n\n", " two lines"),
    ("The answer is", " two lines"),
    ("Ends in\u00a0", "an odd blank"),
]


def harness_split(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm_eval/base.py at 00209e10f, loglikelihood and _encode_pair."""
    if context.strip() == "":
        return [tokenizer.eos_token_id], tokenizer.encode(context + continuation)
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces > 0:
        continuation = context[-num_spaces:] + continuation
        context = context[:-num_spaces]
    whole, own = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return own, whole[len(own) :]


def test_every_text_in_one_call_gives_the_ids_of_one_call_per_text(shared_data, tokenizer):
    documents = load_documents(resolve_tasks(["truthfulqa", "ethics"]), shared_data, limit=150)
    requests = [r for rows in documents.values() for row in rows for r in row.requests] + ODD
    encoder = RequestEncoder(tokenizer, max_length=4096, vocab_size=32000)
    encoded = encoder.encode(requests, [f"request {i}" for i in range(len(requests))])
    assert len(encoded) == len(requests) > 2000
    for request, found in zip(requests, encoded, strict=True):
        context_ids, target_ids = harness_split(tokenizer, *request)
        assert found.input_ids.tolist() == (context_ids + target_ids)[:-1], request
        assert found.target_ids.tolist() == target_ids, request


def test_a_text_that_is_not_unicode_is_refused(tokenizer):
    encoder = RequestEncoder(tokenizer, max_length=4096, vocab_size=32000)
    with pytest.raises(UserError, match="Unicode"):
        encoder.encode([("a", " b"), ("half a character \ud800", " c")], ["first", "second"])
