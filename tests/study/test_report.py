"""report.md: verdicts first, gaps where runs are missing, and where everything comes from."""

import csv
import re

import numpy as np
import pytest

from mmalign.evaluation.items import read_items
from mmalign.study.gains import style_correlations
from mmalign.study.identity import Orders
from mmalign.study.report import write_study
from mmalign.study.schedule import run_study
from mmalign.study.scores import collect, score
from mmalign.study.study_file import read_study
from tests.study.conftest import STUDY


@pytest.fixture(scope="module")
def report(finished) -> str:
    return (finished.study.output / "report.md").read_text()


def test_verdicts_come_first(report):
    lines = report.splitlines()
    assert lines[2].startswith("- **Q1** Does tuning help? **")
    assert re.search(r"\*\*(supported|contradicted|cannot tell)\*\*: [-+]\d+\.\d points", lines[2])
    assert "smallest effect that could have been seen" in lines[2]
    assert "Unfinished" not in report


def test_scores_are_means_over_seeds(finished, report):
    scores = collect(finished)
    values = [score(scores["small", "visual", seed], "truthfulqa_mc2") for seed in (0, 1)]
    row = next(line for line in report.splitlines() if line.startswith("|  | visual |"))
    assert row.split("|")[4].strip().startswith(f"{100 * sum(values) / 2:.1f} (")
    assert "| *chance* |" in report


def test_csv_files(finished):
    folder = finished.study.output
    with open(folder / "contrasts.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["question"] for row in rows] == ["Q1", "Q2"]
    scores = collect(finished)
    gains = [
        score(scores["small", "visual", seed], "truthfulqa_mc2")
        - score(scores["small", "base", -1], "truthfulqa_mc2")
        for seed in (0, 1)
    ]
    assert float(rows[0]["difference"]) == pytest.approx(sum(gains) / 2)
    with open(folder / "runs.csv") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done"] * 9
    assert (folder / "contrasts.png").exists()


def test_gaps_and_other_settings(study_file):
    """A report of what is there: the base alone; a run with other settings is named."""
    path = study_file(STUDY.replace("[0, 1]", "[0]"))
    other = Orders(read_study(path, {"finetune.num-steps": 2}))
    assert run_study(other, other.study.chosen(["text-only"], []), jobs=1) == {}
    orders = Orders(read_study(path))
    assert run_study(orders, orders.study.chosen(["base"], []), jobs=1) == {}
    said = write_study(orders)
    text = (orders.study.output / "report.md").read_text()
    assert "Q1 Does tuning help? not run." in said
    assert "**Unfinished**: of 5 runs 1 done, 4 new." in text
    assert "|  | visual | - | - |" in text
    folder = next(other[run].folder for run in other.study.runs if run.variant == "text-only")
    assert f"`{folder}`: num_steps 2 (here 3)" in text


def test_gain_and_style_of_each_run(finished):
    """As NumPy's correlation of the same choices."""
    found = style_correlations(finished)
    assert list(found) == ["visual", "text-only", "part"]
    base, own = (
        read_items(finished[run].scores)["truthfulqa_mc2"]
        for run in (
            next(x for x in finished.study.runs if x.variant == "base"),
            next(x for x in finished.study.runs if (x.variant, x.seed) == ("visual", 1)),
        )
    )
    raised, length = [], []
    for a, b in zip(base, own, strict=True):
        pairs = zip(a["choices"], b["choices"], strict=True)
        gain = [y["loglikelihood"] - x["loglikelihood"] for x, y in pairs]
        tokens = [x["num_tokens"] for x in a["choices"]]
        raised += list(np.array(gain) - np.mean(gain))
        length += list(np.array(tokens) - np.mean(tokens))
    assert np.std(length) > 0
    expected = np.corrcoef(raised, length)[0, 1]
    assert found["visual"][1][0] == pytest.approx(expected)
    gained = np.mean([y["score"] - x["score"] for x, y in zip(base, own, strict=True)])
    assert found["visual"][1][2] == pytest.approx(gained)
    assert (finished.study.output / "style.png").exists()
