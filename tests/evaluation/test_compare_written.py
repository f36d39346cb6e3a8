"""Paired comparisons of written answers: by hand, against scipy, and pairs that say nothing."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from mmalign.errors import UserError
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.tasks.truthfulqa_gen import METRICS
from scripts import compare as command

from .made_up import make_evaluation


def make_written(folder, diffs, answers=((0, 0),) * 4, weights="W", **config):
    """An evaluation whose written answers have these differences, in points, by every metric."""
    make_evaluation(folder, {"ethics_virtue": answers}, weights="W")
    settings = {"weights": weights, "data": {"sha256": "0"}, "prompts": "harness"}
    settings |= {"generation": {"max_new_tokens": 256}, "score": "BLEU and ROUGE"}
    settings |= {"versions": {"sacrebleu": "2.5.1", "rouge-score": "0.1.2"}} | config
    lines = []
    for i, diff in enumerate(diffs):
        scores = {f"{name}_diff": diff for name in METRICS}
        scores |= {f"{name}_acc": float(diff > 0) for name in METRICS}
        line = {"doc_id": i, "question": f"question {i}", "answer": "A: yes", "scores": scores}
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "truthfulqa_gen.jsonl").write_text(text)
    summary = {"truthfulqa_gen": {"n": len(diffs)}, "config": settings}
    (folder / "truthfulqa_gen.json").write_text(json.dumps(summary))
    return folder


def test_by_hand(tmp_path):
    """Five questions: two turn true, none false, and the similarity rises by 16 points."""
    a = make_written(tmp_path / "a", [-30.0, -10.0, 5.0, 20.0, 0.0])
    b = make_written(tmp_path / "b", [10.0, 10.0, 25.0, 20.0, 0.0])
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


def test_intervals_against_scipy(tmp_path):
    draw = np.random.default_rng(0)
    diffs_a = draw.normal(0, 20, 200)
    diffs_b = diffs_a + draw.normal(4, 10, 200)
    a, b = make_written(tmp_path / "a", diffs_a), make_written(tmp_path / "b", diffs_b)
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


def test_two_copies_of_a_model(tmp_path):
    a, b = (make_written(tmp_path / name, [1.0, -2.0, 3.0]) for name in ("a", "b"))
    for name, row in compare_evaluations(a, b)["tasks"].items():
        assert row["interval"] == (0, 0) and row.get("p_holm", 1) == 1, name


def test_command(tmp_path, capsys):
    a = make_written(tmp_path / "base", [-30.0] * 30)
    b = make_written(tmp_path / "tuned", [10.0] * 30)
    for folder, mean in ((a, -30.0), (b, 10.0)):  # what the report shows of each alone
        path = folder / "truthfulqa_gen.json"
        written = json.loads(path.read_text())
        score = {"mean": mean, "interval": [mean, mean], "constant": 0.0}
        kinds = {f"{name}_{kind}": score for name in METRICS for kind in ("diff", "acc")}
        written["truthfulqa_gen"] |= kinds
        path.write_text(json.dumps(written))
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
    assert len(rows) == 1 + 2 * len(METRICS)


# ---- pairs that say nothing ----


def test_only_one_has_written_answers(tmp_path):
    """Those of other weights, left in the folder by an earlier model, count as none."""
    a = make_written(tmp_path / "a", [1.0])
    b = make_written(tmp_path / "b", [1.0], weights="of another model")
    comparison = compare_evaluations(a, b)
    assert list(comparison["tasks"]) == ["ethics_virtue"]
    assert comparison["only_in_one"] == ["truthfulqa_gen"]


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"sha256": "1"}},
        {"generation": {"max_new_tokens": 50}},
        {"versions": {"sacrebleu": "1.5.0", "rouge-score": "0.1.2"}},
    ],
    ids=["file", "generation", "version"],
)
def test_other_questions_are_refused(tmp_path, changed):
    a = make_written(tmp_path / "a", [1.0])
    b = make_written(tmp_path / "b", [1.0], **changed)
    with pytest.raises(UserError, match=r"truthfulqa_gen: .*did not ask the same: \w+ is "):
        compare_evaluations(a, b)


def test_answers_that_are_missing_or_torn_are_refused(tmp_path):
    a, b = (make_written(tmp_path / name, [1.0, 2.0]) for name in ("a", "b"))
    lines = (b / "truthfulqa_gen.jsonl").read_text().splitlines()
    (b / "truthfulqa_gen.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(UserError, match="the questions of .* differ"):
        compare_evaluations(a, b)
    (b / "truthfulqa_gen.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    with pytest.raises(UserError, match=r"truthfulqa_gen\.jsonl, line 2: not an item"):
        compare_evaluations(a, b)
    (b / "truthfulqa_gen.jsonl").unlink()
    with pytest.raises(UserError, match="truthfulqa_gen.jsonl does not exist; evaluate the model"):
        compare_evaluations(a, b)
    (b / "truthfulqa_gen.json").write_text('{"truthfulqa_gen": {')
    with pytest.raises(UserError, match="truthfulqa_gen.json is not valid JSON"):
        compare_evaluations(a, b)
