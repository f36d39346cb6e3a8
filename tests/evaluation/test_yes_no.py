"""POPE and MME against recorded outputs of their published scripts."""

import json

import pytest
from scipy.stats import mannwhitneyu

from mmalign.evaluation.yes_no import (
    COGNITION,
    NOT_SCORED_AS_RELEASED,
    PERCEPTION,
    auroc,
    mme_scores,
    mme_totals,
    parse_mme,
    parse_pope,
    parse_yes_no,
    yes_no_scores,
)


@pytest.fixture(scope="module")
def pope(shared_data):
    return json.loads((shared_data / "formats" / "pope.json").read_text())


@pytest.fixture(scope="module")
def mme(shared_data):
    return json.loads((shared_data / "formats" / "mme.json").read_text())


def test_pope_parsers(pope):
    for row in pope["parser"]:
        assert parse_pope(row["answer"]) == row["official"], row
        assert (parse_yes_no(row["answer"]) or "unparsed") == row["standard"], row


@pytest.mark.parametrize("reading", ["official", "standard"])
def test_pope_scores(pope, reading):
    parse = {"official": parse_pope, "standard": parse_yes_no}[reading]
    sets = [(x["name"], [(r["label"], r["answer"]) for r in x["rows"]], x) for x in pope["sets"]]
    sets += [
        (x["name"], list(zip(x["labels"], x["answers"], strict=True)), x)
        for x in pope["edge_cases"]
    ]
    for name, rows, expected in sets:
        labels = [label for label, _ in rows]
        found = yes_no_scores(labels, [parse(answer) for _, answer in rows])
        wanted = expected[reading]
        if "error" in wanted:  # the script divides by zero; we count 0
            assert found["f1"] == found["precision"] == 0
        for key in found.keys() & wanted.keys():
            assert found[key] == pytest.approx(wanted[key], abs=1e-9), (name, key)


def test_mme_parser(mme):
    for row in mme["parser"]:
        assert (parse_mme(row["answer"]) or "other") == row["official"], row


def test_mme_scores(mme):
    scores = {}
    for name, expected in mme["subtasks"].items():
        rows = expected["rows"]
        parsed = [parse_mme(row[3] or "") or "other" for row in rows]
        assert parsed == [row[4] for row in rows]
        right = [row[2].lower() == answer for row, answer in zip(rows, parsed, strict=True)]
        found = mme_scores([row[0] for row in rows], right)
        assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-9), name
        assert (name in PERCEPTION) == (expected["type"] == "Perception")
        scores[name] = found["score"]
    assert set(scores) == {*PERCEPTION, *COGNITION}
    for left_out, key in (
        ((), "all_14"),
        (
            NOT_SCORED_AS_RELEASED,
            "without_landmark_and_artwork",
        ),
    ):
        expected = {kind.lower(): value for kind, value in mme["totals"][key].items()}
        assert mme_totals(scores, left_out) == pytest.approx(expected)


def test_area_under_the_curve_counts_ties_half():
    labels = ["yes", "no", "yes", "no", "yes", "no", "no"]
    log_odds = [0.5, 0.5, 2.0, -1.0, 0.0, 0.0, 3.0]
    yes, no = ([x for x, y in zip(log_odds, labels, strict=True) if y == z] for z in ("yes", "no"))
    expected = mannwhitneyu(yes, no).statistic / (len(yes) * len(no))
    assert auroc(labels, log_odds) == pytest.approx(expected)
    assert auroc(["yes"], [1.0]) is None
