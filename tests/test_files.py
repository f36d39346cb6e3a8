"""metrics.jsonl: of lines that contradict each other the fewest are left out."""

import json
from itertools import combinations
from random import Random

import pytest

from mmalign.files import read_steps


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
