"""VQA accuracy against recorded outputs of the official evaluation code."""

import json
from collections import defaultdict

import pytest

from mmalign.evaluation.vqa_accuracy import (
    most_common_answer,
    normalise_answer,
    normalised,
    vqa_accuracy,
)


@pytest.fixture(scope="module")
def recorded(shared_data):
    return json.loads((shared_data / "formats" / "vqa.json").read_text())


@pytest.mark.parametrize("reading", ["official", "standard"])
def test_rows_and_means(recorded, reading):
    by_kind, by_type, scores = defaultdict(list), defaultdict(list), []
    for row in recorded["rows"]:
        expected = row[reading]
        answers = expected.get("answers", row["standard"]["answers"])
        found = normalised(row["prediction"], row["answers"], reading)
        assert found == (expected["prediction"], answers), row
        scores.append(vqa_accuracy(row["prediction"], row["answers"], reading))
        assert scores[-1] == pytest.approx(expected["accuracy"], abs=1e-9), row
        by_kind[row["answer_type"]].append(scores[-1])
        by_type[row["question_type"]].append(scores[-1])
    aggregate = recorded["aggregate"][reading]
    assert 100 * sum(scores) / len(scores) == pytest.approx(aggregate["overall"])
    for name, groups in (("per_answer_type", by_kind), ("per_question_type", by_type)):
        means = {kind: 100 * sum(values) / len(values) for kind, values in groups.items()}
        assert means == pytest.approx(aggregate[name])


def test_edge_cases(recorded):
    by_id, by_version = recorded["edge_cases"]
    for row in by_id["rows"]:
        found = vqa_accuracy(row["prediction"], row["answers"], "official")
        assert found == pytest.approx(row["accuracy_with_answer_id"])
    for row in by_version["rows"]:
        expected = row["python_3"]
        found = normalised(row["prediction"], row["answers"], "official")
        assert found == (expected["prediction"], expected["answers"])
        found = vqa_accuracy(row["prediction"], row["answers"], "official")
        assert found == pytest.approx(expected["accuracy"])


def test_normalising_is_for_raw_answers():
    assert normalise_answer("a, b") == "b"  # the article rule eats the letter
    assert normalise_answer("somebody'd") == "somebodyd"
    assert most_common_answer(["Two", "2", "three"]) == "2"
