"""Parts of a file are nested, and matched in what they say they are."""

import pytest

from mmalign.data.controls.control import parse_samples
from mmalign.data.samples import Sample
from mmalign.data.subsets import take_samples, take_tokens
from mmalign.errors import UserError


def samples(num: int) -> list[Sample]:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]
    return parse_samples(
        [
            {"id": i, "conversations": [*turns[:1], {"from": "gpt", "value": "a " * (i % 7 + 1)}]}
            for i in range(num)
        ]
    )


def count(sample) -> int:
    return len(sample.conversations[1].text.split())


def test_smaller_parts_are_the_beginning_of_larger_ones():
    parts = [take_samples(80, n, seed=3) for n in (10, 20, 40, 80)]
    for smaller, larger in zip(parts, parts[1:], strict=False):
        assert larger[: len(smaller)] == smaller
    assert sorted(parts[-1]) == list(range(80))
    assert take_samples(80, 10, seed=4) != parts[0]


def test_tokens_are_reached_and_not_exceeded_by_a_sample():
    taken = take_tokens(samples(80), 100, 3, count)
    total = sum(count(samples(80)[i]) for i in taken)
    assert 100 <= total < 107
    assert taken == take_samples(80, len(taken), seed=3)


def test_too_small_a_file_is_an_error():
    with pytest.raises(UserError, match="80 samples, expected at least 81"):
        take_samples(80, 81, 0)
    with pytest.raises(UserError, match="with 314 supervised tokens, expected at least 315"):
        take_tokens(samples(80), 315, 0, count)
    assert len(take_tokens(samples(80), 314, 0, count)) == 80
