"""Noise of the last checkpoints: from the scores that training has logged, beside differences."""

import csv
import json
import math
import statistics

import pytest

from mmalign.study.checkpoint_noise import noise_of
from mmalign.study.contrasts import Answer, Question, parse_contrast
from mmalign.study.identity import Orders
from mmalign.study.report import write_study
from mmalign.study.schedule import run_study
from mmalign.study.study_file import read_study
from tests.study.conftest import STUDY

EVALUATED = "evaluation.every = 1\nevaluation.limit = 4\nnum-steps = 6\nglobal-batch-size"


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Orders:
    """The study with scores after each of six steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    text = STUDY.replace("num-steps = 3\nglobal-batch-size", EVALUATED)
    path = folder / "study.toml"
    path.write_text(text.format(world=world, output=folder / "study"))
    orders = Orders(read_study(path))
    chosen = orders.study.chosen(["base", "visual", "part"], [])
    assert run_study(orders, [*orders.study.chosen(["pretrain"], []), *chosen], jobs=1) == {}
    write_study(orders)
    return orders


def _logged(orders: Orders, variant: str, seed: int) -> list[float]:
    run = next(x for x in orders.study.runs if (x.variant, x.seed) == (variant, seed))
    lines = (orders[run].train_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "evaluation/truthfulqa_mc2" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    return [row["evaluation/truthfulqa_mc2"] for row in rows]


def test_spread_of_the_last_five_evaluations(evaluated):
    """As Python's statistics gives it from metrics.jsonl; of two variants in quadrature."""
    variances = {
        variant: statistics.mean(
            statistics.variance(_logged(evaluated, variant, seed)[-5:]) for seed in (0, 1)
        )
        for variant in ("visual", "part")
    }
    with open(evaluated.study.output / "contrasts.csv") as file:
        rows = {row["question"]: row for row in csv.DictReader(file)}
    found = {name: float(row["checkpoint_noise"]) for name, row in rows.items()}
    assert found["Q1"] == pytest.approx(math.sqrt(variances["visual"]))  # the base has none
    assert found["Q2"] == pytest.approx(math.sqrt(sum(variances.values())))
    assert found["Q1"] > 0


def test_report_shows_it_beside_the_difference(evaluated):
    report = (evaluated.study.output / "report.md").read_text()
    contrasts = report[report.index("## Contrasts") :]
    heading, _, first = contrasts.split("\n\n")[1].splitlines()[:3]
    cells = dict(zip(heading.split("|"), first.split("|"), strict=True))
    assert cells[" checkpoints "].strip().startswith("± ")
    assert "depends on where training ended" in contrasts


def test_unknown_where_training_was_not_evaluated(finished):
    with open(finished.study.output / "contrasts.csv") as file:
        assert {row["checkpoint_noise"] for row in csv.DictReader(file)} == {""}
    assert "*checkpoints*" not in (finished.study.output / "report.md").read_text()


def test_of_an_interaction_it_is_unknown():
    question = Question("Q", "", "(visual - base) on truthfulqa_mc2 vs ethics_mean")
    both = "truthfulqa_mc2 vs ethics_mean"
    test = Answer(question, parse_contrast(question), "small", both, "not run")
    assert (
        noise_of(test, {("small", "visual"): {"truthfulqa_mc2": 0.1, "ethics_mean": 0.2}}) is None
    )
