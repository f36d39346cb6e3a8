"""report.md of synthetic runs and evaluations: its sentences, tables and figures."""

import csv
import json

import matplotlib
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.evaluation.items import read_results
from mmalign.evaluation.metrics import caveats
from mmalign.evaluation.report import write_report
from mmalign.evaluation.report.plots import plot_scores
from mmalign.evaluation.report.tables import abridged, cell

from .synthetic import make_evaluation, make_run

YES, NO = 0, 1


def make_virtue(folder, num_right, n=100, **config):
    """ethics_virtue with the first num_right of n documents answered right; all are "yes"."""
    answers = [(YES, YES if i < num_right else NO) for i in range(n)]
    return make_evaluation(folder, {"ethics_virtue": answers}, **config)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_image(path):
    with Image.open(path) as image:
        assert image.width > 600 and len(image.convert("L").getcolors()) > 10


def assert_tables_are_whole(text):
    for block in text.split("\n\n"):
        if block.startswith("|"):  # every row of a table has as many cells as its heading
            lines = block.replace("\\|", "").splitlines()
            assert len({line.count("|") for line in lines}) == 1, block


def test_settings_of_matplotlib_change_no_figure(tmp_path):
    results = {"$\\frac$": read_results(make_virtue(tmp_path / "base", 50))}  # shown as written
    plot_scores(results, tmp_path / "ours.png")
    with matplotlib.rc_context({"font.size": 40, "savefig.dpi": 30, "text.usetex": True}):
        plot_scores(results, tmp_path / "theirs.png")
    assert_image(tmp_path / "ours.png")
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


def test_report(tmp_path):
    stages = {name: make_run(tmp_path / name) for name in ("pretrain", "finetune")}
    evaluations = {
        "base": make_virtue(tmp_path / "base", 50),
        "tuned": make_virtue(tmp_path / "tuned", 80),
    }
    path = write_report(tmp_path / "out" / "report.md", stages, evaluations, "A title")
    text = path.read_text()
    assert text.startswith("# A title\n")
    assert "**ethics_virtue**: tuned 80.0 against base 50.0, a difference of +30.0" in text
    assert "| ethics_virtue | 100 | **50.0** (" in text
    assert "cannot be distinguished from chance (50.0)" in text
    assert "| pretrain | 60 | 240 | 6,000 | 3.000 |" in text
    assert "| model | base: base; tuned: tuned |" in text
    for figure in ("scores.png", "training.png"):
        assert f"({figure})" in text
        assert_image(path.parent / figure)
    assert_tables_are_whole(text)


def test_report_of_training_alone(tmp_path):
    path = write_report(tmp_path / "report.md", {"pretrain": make_run(tmp_path / "run")}, {})
    text = path.read_text()
    assert "## Training" in text and "## Scores" not in text


def test_many_models_side_by_side(tmp_path):
    """One lacks a task, one has another tokenizer; all are compared with the first."""
    both = {"ethics_virtue": [(YES, NO)] * 10, "ethics_commonsense": [(NO, NO)] * 9 + [(NO, YES)]}
    folders = {
        "a": make_evaluation(tmp_path / "a", both),
        "b": make_virtue(tmp_path / "b", 10, n=10, tokenizer="tokenizer.json, 100 tokens"),
        "c": make_evaluation(tmp_path / "c", both | {"ethics_virtue": [(YES, YES)] * 10}),
    }
    text = write_report(tmp_path / "out" / "report.md", {}, folders).read_text()
    row = (
        "| ethics_commonsense | 10 | **90.0** (59.6 to 98.2) |  | **90.0** (59.6 to 98.2) | 50.0 |"
    )
    assert row in text
    assert (
        "| tokenizer | a: tokenizer.model, 32,000 tokens; b: tokenizer.json, 100 tokens; c: "
        in text
    )
    assert "[flipped_1.jsonl](flipped_1.jsonl)" in text and "[flipped_2.jsonl]" in text
    assert_tables_are_whole(text)
    assert_image(tmp_path / "out" / "scores.png")
    scores = read_csv(tmp_path / "out" / "scores.csv")
    assert [(row["model"], row["task"]) for row in scores] == [
        ("a", "ethics_commonsense"),
        ("a", "ethics_virtue"),
        ("b", "ethics_virtue"),
        ("c", "ethics_commonsense"),
        ("c", "ethics_virtue"),
    ]
    summary = read_results(folders["a"])["ethics_commonsense"]
    assert float(scores[0]["acc"]) == 0.9 and float(scores[0]["low"]) == summary["interval"][0]
    assert scores[0]["constant_answers"] == "always yes: 0.0000; always no: 1.0000"
    differences = read_csv(tmp_path / "out" / "differences.csv")
    assert [(row["a"], row["b"], row["task"]) for row in differences] == [
        ("a", "b", "ethics_virtue"),
        ("a", "c", "ethics_commonsense"),
        ("a", "c", "ethics_virtue"),
    ]
    assert differences[0]["difference"] == "1.0" and differences[0]["gained"] == "10"


def test_scores_during_training(tmp_path):
    run = make_run(tmp_path / "run", num_steps=4)
    records = [{"step": i, "loss": 1.0, "tokens": 9, "samples": 1, "tokens_per_second": 9.0}
               for i in range(1, 5)]  # fmt: skip
    for record in records:
        record["seconds"] = 10.0
    records[1]["evaluation_seconds"] = records[3]["evaluation_seconds"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    for step, right in ((0, 50), (2, 60), (4, 80)):
        make_virtue(run / "evaluation" / f"step_{step}", right, limit=100)
    (run / "evaluation" / "step_6").mkdir()  # a kill left it without results.json
    path = write_report(tmp_path / "out" / "report.md", {"finetune": run}, {})
    text = path.read_text()
    for row in (
        "| base model | 50.0 |",
        "| step 2 | 60.0 |",
        "| step 4 | **80.0** (",
        "| chance |",
    ):
        assert row in text
    # twice 0.5 s, and 1.0 s for the base model, beside four steps of 10 s
    assert "Evaluation took 2.0 s, 4.8% of the time" in text
    assert_tables_are_whole(text)
    assert_image(path.parent / "scores_during_finetune.png")
    make_virtue(run / "evaluation" / "step_6", 80, limit=50)
    with pytest.raises(UserError, match="the steps were scored on different documents"):
        write_report(path, {"finetune": run}, {})


def test_documents_that_were_cut():
    summary = {"acc": 0.9, "interval": (0.8, 0.95), "chance": 0.5, "n": 1200, "num_truncated": 3}
    assert caveats("ethics_mean", summary) == [
        "ethics_mean: 3 of 1,200 documents are longer than the model's context and were "
        "truncated on the left."
    ]
    assert caveats("ethics_mean", summary | {"num_truncated": 0}) == []


def test_excerpts():
    assert cell("a | b\n\n <image> c", 40) == "a \\| b / &lt;image> c"
    assert abridged("0123456789" * 3, 10) == "01234 ... 56789"
    assert abridged("0123456789", 10) == "0123456789"


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="not a finished evaluation: results.json is missing"):
        write_report(tmp_path / "report.md", {}, {"base": tmp_path})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="metrics.jsonl is missing"):
        write_report(tmp_path / "report.md", {"pretrain": tmp_path}, {})
