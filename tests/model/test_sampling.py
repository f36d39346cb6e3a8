"""Sampling against transformers' warpers, and text as it grows."""

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmalign.model.sampling import TextStream, draw, sampling_probabilities
from mmalign.tokenizer import Tokenizer
from tests.model.tiny import Letters


def test_probabilities_are_those_of_transformers_warpers():
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 4
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.3, 0, 0.9), (0.4, 20, 0.5), (2.0, 7, 1.0)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        expected = TopPLogitsWarper(top_p)(None, expected).softmax(1)
        found = sampling_probabilities(logits, temperature, top_k, top_p)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 20_000
    uniforms = (torch.arange(n) + 0.5) / n
    counts = draw(probabilities.expand(n, -1), uniforms.double()).bincount(minlength=6)
    torch.testing.assert_close(counts / n, probabilities, rtol=0, atol=2 / n)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(2, -1), edges).tolist() == [0, 4]


def test_stream_of_any_tokens_adds_up_to_their_text(shared_data):
    tokenizer = Tokenizer.from_pretrained(shared_data / "llama_tokenizer")
    generator = torch.Generator().manual_seed(1)
    text = "Two  blanks,\n\n a \u2603 and \U0001f600\U0001f600 \u00e9."
    random = torch.randint(3, 32000, (300,), generator=generator).tolist()
    for ids in (tokenizer.encode(text), random, tokenizer.encode(text) + [200]):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
        assert "".join(pieces) == stream.text == tokenizer.decode(ids)


def test_stream_holds_back_what_may_become_a_stop_string():
    stream = TextStream(Letters(), ["abc", "x"])
    pieces = [stream.push(ord(letter) - 48) for letter in "qabab"]
    assert pieces == ["q", "", "", "ab", ""]
    assert stream.push(ord("c") - 48) == "" and stream.stopped
    assert stream.text == "qab" and stream.finish() == ""
