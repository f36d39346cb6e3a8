"""Paired comparisons of made-up evaluations: by hand, against scipy, and what must not be found."""

import json

import numpy as np
import pytest
from scipy import stats

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import read_results
from mmalign.evaluation.report import name_evaluations, write_report

from .made_up import make_evaluation

YES, NO = 0, 1  # the choices of ethics_virtue and ethics_commonsense
RIGHT, WRONG = (YES, YES), (YES, NO)


def compare(tmp_path, task, pattern_a, pattern_b):
    """pattern: one letter a document, r where the model is right, w where it is wrong."""
    for name, pattern in (("a", pattern_a), ("b", pattern_b)):
        answers = [RIGHT if letter == "r" else WRONG for letter in pattern]
        make_evaluation(tmp_path / name, {task: answers})
    comparison = compare_evaluations(tmp_path / "a", tmp_path / "b")
    return comparison["tasks"][task], comparison["flipped"]


def test_by_hand(tmp_path):
    row, flipped = compare(tmp_path, "ethics_commonsense", "rrrw", "wrrr")
    assert (row["acc_a"], row["acc_b"], row["difference"]) == (0.75, 0.75, 0)
    assert (row["lost"], row["gained"], row["p"], row["p_holm"]) == (1, 1, 1, 1)
    # four draws from (-1, 0, 0, 1): P(mean = -1) = 1/256, P(mean <= -3/4) = 9/256 > 2.5%
    assert row["interval"] == (-0.75, 0.75)
    assert [(d["doc_id"], d["turned"]) for d in flipped] == [(0, "lost"), (3, "gained")]
    lost = {"context": "question 0", "choices": [" yes", " no"], "gold": YES}
    assert flipped[0].items() >= (lost | {"prediction_a": YES, "prediction_b": NO}).items()


def test_mcnemar_by_hand(tmp_path):
    row, _ = compare(tmp_path, "ethics_commonsense", "wwwwwwrrrr", "rrrrrrwrrr")
    assert (row["lost"], row["gained"]) == (1, 6)
    assert row["p"] == 2 * (1 + 7) / 2**7  # 0 or 1 of 7 fair coins, both sides
    assert row["difference"] == pytest.approx(0.5)


def test_holm_over_the_tasks(tmp_path):
    """p of 1/128 and of 1/8: twice the smaller, once the larger."""
    better, worse = [RIGHT] * 8, [WRONG] * 8
    half = [RIGHT] * 4 + [WRONG] * 4
    tasks = ("ethics_commonsense", "ethics_utilitarianism")
    make_evaluation(tmp_path / "a", dict(zip(tasks, (worse, half), strict=True)))
    make_evaluation(tmp_path / "b", dict(zip(tasks, (better, better), strict=True)))
    found = compare_evaluations(tmp_path / "a", tmp_path / "b")["tasks"]
    assert [found[task]["p"] for task in tasks] == [1 / 128, 1 / 8]
    assert [found[task]["p_holm"] for task in tasks] == [1 / 64, 1 / 8]


def test_intervals_of_groups_against_scipy(tmp_path):
    """Virtue: groups of 5 are drawn whole, so the groups' means are what scipy resamples."""
    draw = np.random.default_rng(0)
    scores = draw.random((2, 60, 1)) < 0.6
    scores = np.where(draw.random((2, 60, 5)) < 0.7, scores, ~scores)  # alike within a group
    patterns = ["".join(np.where(x.ravel(), "r", "w")) for x in scores]
    row, flipped = compare(tmp_path, "ethics_virtue", *patterns)
    difference = (scores[1].mean(axis=1) - scores[0].mean(axis=1),)  # (60 groups,)
    expected = stats.bootstrap(
        difference, np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # two Monte Carlo estimates of one quantile: their own error is about 4% of the width
    width = expected.high - expected.low
    assert row["interval"] == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    lost, gained = int((scores[0] & ~scores[1]).sum()), int((~scores[0] & scores[1]).sum())
    assert (row["lost"], row["gained"]) == (lost, gained)
    assert row["p"] == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-9)
    assert len(flipped) == lost + gained
    assert row["em_a"] == pytest.approx(scores[0].all(axis=1).mean())


def test_two_copies_of_a_model_in_the_report(tmp_path):
    answers = {"ethics_commonsense": [RIGHT, WRONG] * 20, "ethics_virtue": [(NO, NO)] * 20}
    folders = [make_evaluation(tmp_path / name, answers) for name in ("a", "b")]
    report = write_report(tmp_path / "out" / "report.md", {}, name_evaluations(folders)).read_text()
    assert (
        "No difference between b and a can be told from zero on ethics_commonsense, ethics_virtue."
        in report
    )
    assert "flipped" not in report
    assert (tmp_path / "out" / "flipped.jsonl").read_text() == ""


def test_a_model_that_always_says_yes(tmp_path):
    gold = [YES] * 52 + [NO] * 48
    draw = np.random.default_rng(0)
    knows = [(g, g if draw.random() < 0.9 else 1 - g) for g in gold]
    makes = {"knows": knows, "yes": [(g, YES) for g in gold]}
    folders = {
        n: make_evaluation(tmp_path / n, {"ethics_commonsense": a}) for n, a in makes.items()
    }
    report = write_report(tmp_path / "out" / "report.md", {}, folders).read_text()
    assert 'ethics_commonsense: the model answers "yes" to 100.0% of the documents.' in report
    assert (
        "ethics_commonsense: 52.0 (42.3 to 61.5) cannot be told from chance (50.0), always yes "
        "(52.0) or always no (48.0)." in report
    )
    assert "Scores of **yes** to read with care:" in report
    assert "Scores of **knows**" not in report


# ---- pairs that say nothing ----


def test_other_prompts_are_not_compared(tmp_path):
    answers = {"ethics_virtue": [RIGHT] * 5}
    a = make_evaluation(tmp_path / "a", answers)
    b = make_evaluation(tmp_path / "b", answers, prompts="lm-evaluation-harness 0.4, five-shot")
    with pytest.raises(
        UserError, match="did not ask the same: prompts is .*2023.* and .*five-shot"
    ):
        compare_evaluations(a, b)
    results = json.loads((b / "results.json").read_text())
    del results["config"]["bos"]
    (b / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="does not say its bos.*Evaluate the model again"):
        compare_evaluations(a, b)


def test_no_task_in_common(tmp_path):
    a = make_evaluation(tmp_path / "a", {"ethics_virtue": [RIGHT] * 5})
    b = make_evaluation(tmp_path / "b", {"ethics_justice": [RIGHT] * 4})
    with pytest.raises(UserError, match="no task in common"):
        compare_evaluations(a, b)


def test_what_differs_between_the_models_is_told(tmp_path):
    answers = {"ethics_virtue": [RIGHT] * 5}
    a = make_evaluation(tmp_path / "a", answers)
    versions = read_results(a)["config"]["versions"] | {"torch": "2.0.0"}
    b = make_evaluation(tmp_path / "b", answers, precision="bf16", versions=versions)
    settings = compare_evaluations(a, b)["settings"]
    assert settings.keys() == {"precision", "torch"} and settings["precision"] == ["fp32", "bf16"]
    report = write_report(tmp_path / "report.md", {}, {"a": a, "b": b}).read_text()
    assert "Not the same in both evaluations:\n\n- precision: a fp32, b bf16" in report


def test_names_tell_folders_apart(tmp_path):
    a, b = tmp_path / "x" / "scores", tmp_path / "y" / "scores"
    assert name_evaluations([a, b]) == {"x/scores": a, "y/scores": b}
    assert name_evaluations([a, tmp_path / "z"]) == {"scores": a, "z": tmp_path / "z"}
    with pytest.raises(UserError, match="given twice"):
        name_evaluations([a, tmp_path / "y" / ".." / "x" / "scores"])
