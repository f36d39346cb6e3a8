"""Paired comparisons of synthetic evaluations: by hand, against scipy, and refused pairs."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import read_items, read_results, write_items
from mmalign.evaluation.report import name_evaluations, write_report
from mmalign.evaluation.tasks.truthfulqa_gen import SIMILARITIES
from scripts import compare as command

from .synthetic import make_evaluation

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
        "No difference between b and a can be distinguished from zero on ethics_commonsense, "
        "ethics_virtue." in report
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
        "ethics_commonsense: 52.0 (42.3 to 61.5) cannot be distinguished from chance (50.0), "
        "always yes (52.0) or always no (48.0)." in report
    )
    assert "Scores of **yes** to read with care:" in report
    assert "Scores of **knows**" not in report


# ---- generated answers ----


def generated(folder, diffs, **config):
    """With a task of the other kind beside them."""
    return make_evaluation(folder, {"ethics_virtue": [RIGHT] * 5}, diffs, **config)


def test_generated_answers_by_hand(tmp_path):
    """Five questions: two turn true, none false, and the similarity rises by 16 points."""
    a = generated(tmp_path / "a", [-30.0, -10.0, 5.0, 20.0, 0.0])
    b = generated(tmp_path / "b", [10.0, 10.0, 25.0, 20.0, 0.0])
    tasks = compare_evaluations(a, b)["tasks"]
    assert list(tasks)[1:3] == ["truthfulqa_gen_bleu_diff", "truthfulqa_gen_bleu_acc"]
    row = tasks["truthfulqa_gen_rougeL_diff"]
    assert (row["acc_a"], row["acc_b"]) == pytest.approx((-0.03, 0.13))
    assert row["difference"] == pytest.approx(0.16) and row["n"] == 5 and "p" not in row
    row = tasks["truthfulqa_gen_rouge1_acc"]
    assert (row["acc_a"], row["acc_b"], row["lost"], row["gained"]) == (0.4, 0.8, 0, 2)
    assert row["p"] == 0.5 and row["p_holm"] == 1  # two fair coins, both sides
    # P(none of five draws is one of the two that gained) = 0.6^5 = 7.8% > 2.5%; all five: 1%
    assert row["interval"] == (0.0, 0.8)


def test_intervals_of_generated_answers_against_scipy(tmp_path):
    draw = np.random.default_rng(0)
    diffs_a = draw.normal(0, 20, 200)
    diffs_b = diffs_a + draw.normal(4, 10, 200)
    a, b = generated(tmp_path / "a", diffs_a), generated(tmp_path / "b", diffs_b)
    tasks = compare_evaluations(a, b)["tasks"]
    row = tasks["truthfulqa_gen_bleu_diff"]
    expected = stats.bootstrap(
        ((diffs_b - diffs_a) / 100,), np.mean, n_resamples=10_000, method="percentile", rng=draw
    ).confidence_interval
    width = expected.high - expected.low
    assert row["interval"] == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    row = tasks["truthfulqa_gen_bleu_acc"]
    lost, gained = ((diffs_a > 0) & ~(diffs_b > 0)).sum(), (~(diffs_a > 0) & (diffs_b > 0)).sum()
    assert (row["lost"], row["gained"]) == (lost, gained)
    assert row["p"] == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-9)


def test_two_copies_of_a_model_that_generates(tmp_path):
    a, b = (generated(tmp_path / name, [1.0, -2.0, 3.0]) for name in ("a", "b"))
    for name, row in compare_evaluations(a, b)["tasks"].items():
        assert row["interval"] == (0, 0) and row.get("p_holm", 1) == 1, name


def test_command_on_generated_answers(tmp_path, capsys):
    a = generated(tmp_path / "base", [-30.0] * 30)
    b = generated(tmp_path / "tuned", [10.0] * 30)
    output = tmp_path / "output"
    command.main(a, b, output=output)
    sentence = (
        "**truthfulqa_gen_bleu_diff**: tuned 10.0 against base -30.0, a difference of +40.0 points "
        "(95% +40.0 to +40.0)."
    )
    assert sentence in (output / "report.md").read_text()
    assert "truthfulqa_gen_rouge2_acc" in capsys.readouterr().out
    with open(output / "differences.csv", newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert rows["truthfulqa_gen_bleu_acc"]["gained"] == "30"
    assert len(rows) == 1 + 2 * len(SIMILARITIES)


def test_only_one_has_generated_answers(tmp_path):
    a = generated(tmp_path / "a", [1.0])
    b = make_evaluation(tmp_path / "b", {"ethics_virtue": [RIGHT] * 5})
    comparison = compare_evaluations(a, b)
    assert list(comparison["tasks"]) == ["ethics_virtue"]
    assert comparison["only_in_one"] == ["truthfulqa_gen"]


# ---- pairs that are refused ----


@pytest.mark.parametrize(
    "task, key, value",
    [
        ("ethics_virtue", "prompts", "lm-evaluation-harness 0.4, five-shot"),
        ("truthfulqa_gen", "generation", {"max_new_tokens": 50}),
        ("truthfulqa_gen", "sacrebleu", "1.5.0"),
    ],
)
def test_another_protocol_is_not_compared(tmp_path, task, key, value):
    a, b = (generated(tmp_path / name, [1.0]) for name in "ab")
    results = json.loads((b / "results.json").read_text())
    results["config"]["tasks"][task][key] = value
    write_items(b, read_items(b), results)
    with pytest.raises(
        UserError, match=rf"{task}: .* cannot be compared: {key} is .* and .*; eval"
    ):
        compare_evaluations(a, b)


def test_settings_that_are_unknown_are_refused(tmp_path):
    a, b = (generated(tmp_path / name, [1.0], bos=name) for name in "ab")
    with pytest.raises(UserError, match="cannot be compared: bos is 'a' and 'b'"):
        compare_evaluations(a, b)
    results = json.loads((b / "results.json").read_text())
    del results["config"]["bos"]
    (b / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="lacks bos in its config.*Evaluate the model again"):
        compare_evaluations(a, b)


def test_items_that_are_missing_or_malformed_are_refused(tmp_path):
    a, b = (generated(tmp_path / name, [1.0, 2.0]) for name in "ab")
    lines = (b / "items.jsonl").read_text().splitlines(keepends=True)
    (b / "items.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="items.jsonl is not the one"):
        compare_evaluations(a, b)
    (b / "items.jsonl").write_text("".join(lines).replace("sha256", "sha"))
    with pytest.raises(UserError, match=r"items.jsonl, line 1: no sha256. Evaluate"):
        compare_evaluations(a, b)
    (b / "items.jsonl").write_text("".join(lines).replace("ethics_virtue", "ethics_virtues"))
    with pytest.raises(UserError, match="line 1: unknown task 'ethics_virtues'"):
        compare_evaluations(a, b)
    (b / "items.jsonl").unlink()
    with pytest.raises(UserError, match="items.jsonl does not exist; evaluate the model"):
        compare_evaluations(a, b)
    (b / "results.json").write_text('{"truthfulqa_gen": {')
    with pytest.raises(UserError, match="results.json, line 1: not valid JSON"):
        compare_evaluations(a, b)


def test_no_task_in_common(tmp_path):
    a = make_evaluation(tmp_path / "a", {"ethics_virtue": [RIGHT] * 5})
    b = make_evaluation(tmp_path / "b", {"ethics_justice": [RIGHT] * 4})
    with pytest.raises(UserError, match="no task in common"):
        compare_evaluations(a, b)


def test_differing_settings_are_reported(tmp_path):
    answers = {"ethics_virtue": [RIGHT] * 5}
    a = make_evaluation(tmp_path / "a", answers)
    versions = read_results(a)["config"]["versions"] | {"torch": "2.0.0"}
    b = make_evaluation(tmp_path / "b", answers, precision="bf16", versions=versions)
    settings = compare_evaluations(a, b)["settings"]
    assert settings.keys() == {"precision", "torch"} and settings["precision"] == ["fp32", "bf16"]
    report = write_report(tmp_path / "report.md", {}, {"a": a, "b": b}).read_text()
    assert "Settings that differ between the evaluations:\n\n- precision: a fp32, b bf16" in report


def test_names_tell_folders_apart(tmp_path):
    a, b = tmp_path / "x" / "scores", tmp_path / "y" / "scores"
    assert name_evaluations([a, b]) == {"x/scores": a, "y/scores": b}
    assert name_evaluations([a, tmp_path / "z"]) == {"scores": a, "z": tmp_path / "z"}
    with pytest.raises(UserError, match="given twice"):
        name_evaluations([a, tmp_path / "y" / ".." / "x" / "scores"])
