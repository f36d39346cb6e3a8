"""Text, TOML and JSON as people write them; and the steps of a damaged metrics.jsonl."""

import json
from itertools import combinations
from random import Random

import pytest

from mmalign.errors import UserError
from mmalign.files import read_json, read_steps, read_toml, sha256


@pytest.mark.parametrize(
    "steps, kept",
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 10**12, 3, 4], [1, 3, 4]),
        ([10**30, 2, 3, 4], [2, 3, 4]),
        ([1, 2, 2, 3], [1, 2, 3]),
        ([2, 1], [2]),
        ([5, 6, 7, 1], [5, 6, 7]),
        ([0, -1, 1.5, 1], [1]),
        ([], []),
    ],
)
def test_a_false_step_hides_no_true_ones(tmp_path, steps, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))
    records, problems = read_steps(path)
    assert [record["step"] for record in records] == kept
    assert len(problems) == len(steps) - len(kept)


def test_no_choice_keeps_more_lines(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", Random(0)
    for _ in range(50):
        steps = [rng.randint(1, 9) for _ in range(rng.randrange(9))]
        path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))
        found = [record["step"] for record in read_steps(path)[0]]
        assert found == sorted(set(found))
        longer = combinations(steps, len(found) + 1)
        assert not any(list(x) == sorted(set(x)) for x in longer)


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "a = " + "[" * 5000, "a = ", "a = 1\na = 2"])
def test_what_is_not_toml(tmp_path, text):
    path = tmp_path / "mix.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mix\.toml: not TOML"):
        read_toml(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_toml(tmp_path / "a.toml") == read_json(tmp_path / "a.json") == {"a": 1}


def test_a_device_has_no_checksum():
    with pytest.raises(UserError, match="/dev/zero is a device"):
        sha256("/dev/zero")
