"""The section of metrics beside the harness's: whole tables, differences, older evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmalign.evaluation.beside import summarize_beside
from mmalign.evaluation.compare import compare_evaluations
from mmalign.evaluation.items import read_items, read_results, write_items
from mmalign.evaluation.report import write_report
from mmalign.evaluation.report.tables import print_comparison, print_results
from mmalign.evaluation.tasks import summarize
from tests.evaluation.synthetic import make_evaluation
from tests.evaluation.test_document_scores import make_items, older
from tests.evaluation.test_report import assert_tables_are_whole, read_csv


def evaluation(folder: Path, items: dict, beside: bool = True) -> Path:
    """An evaluation's output with these items, in the form of the synthetic ones."""
    make_evaluation(folder, {"ethics_virtue": [(0, 0)] * 5})
    config = read_results(folder)["config"] | {"limit": 100}
    virtue = config["tasks"]["ethics_virtue"]
    config["tasks"] = dict.fromkeys(items, virtue)
    results = summarize(items)
    for task, rows in summarize_beside(items).items() if beside else ():
        results[task]["beside"] = rows
    tokens = ("tokens_computed", "tokens_computed_by_harness", "tokens_computed_for_answers_only")
    cost = {"seconds": {"score": 1.0}} | dict.fromkeys(tokens, 1)
    config |= {"cache_bytes": 1}
    write_items(folder, items, results | cost | {"config": config})
    return folder


@pytest.fixture(scope="module")
def folders(shared_data, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluations")
    base, tuned = (make_items(shared_data, seed, limit=100) for seed in (0, 1))
    return {
        "base": evaluation(root / "base", base),
        "tuned": evaluation(root / "tuned", tuned),
        "older": evaluation(root / "older", older(base), beside=False),
    }


def section(path: Path) -> str:
    return path.read_text().split("## Scores that resist artefacts")[1].split("\n## ")[0]


def rows_of(text: str, *first: str) -> list[list[str]]:
    lines = [[x.strip() for x in line.strip("| ").split("|")] for line in text.splitlines()]
    return [cells for cells in lines if tuple(cells[: len(first)]) == first]


def test_section(folders, tmp_path):
    named = {name: folders[name] for name in ("base", "tuned")}
    path = write_report(tmp_path / "report.md", {}, named)
    assert_tables_are_whole(path.read_text())
    text = section(path)
    [heading] = rows_of(text, "ethics")
    [base], [tuned], [change] = (
        rows_of(text, "ethics_justice", who) for who in ("base", "tuned", "tuned - base")
    )
    place = heading.index("auroc")
    results = [read_results(folder)["ethics_justice"] for folder in named.values()]
    areas = [100 * result["beside"]["auroc"]["acc"] for result in results]
    assert [base[place], tuned[place]] == [f"{area:.1f}" for area in areas]
    assert change[place].strip("*") == f"{areas[1] - areas[0]:+.1f}"
    low, high = compare_evaluations(*named.values())["beside"]["ethics_justice"]["auroc"][
        "interval"
    ]
    assert change[place].startswith("**") == (low > 0 or high < 0)
    [rule] = rows_of(text, "least overlap")
    rules = [
        read_results(folders["base"])[x]["rules"] for x in ("truthfulqa_mc1", "truthfulqa_mc2")
    ]
    assert rule[1:] == [f"{100 * x['least overlap']['acc']:.1f}" for x in rules]
    assert rows_of(text, "tuned", "length") and rows_of(text, "tuned", "hedges")
    assert "older" not in text


def test_csv_has_every_number(folders, tmp_path):
    write_report(tmp_path / "report.md", {}, {"base": folders["base"]})
    found = {(x["task"], x["metric"]): x for x in read_csv(tmp_path / "beside.csv")}
    for task, summary in read_results(folders["base"]).items():
        for kind, row in (summary.get("beside", {}) if isinstance(summary, dict) else {}).items():
            assert float(found[task, kind]["acc"]) == row["acc"]
    assert ("truthfulqa_mc1", "rule: least overlap") in found


@pytest.mark.parametrize("order", [("older", "tuned"), ("base", "older"), ("older", "older copy")])
def test_older_evaluations_are_compared_and_said_to_be_older(folders, tmp_path, order, capsys):
    folders = dict(folders)
    copy = {task: rows for task, rows in read_items(folders["older"]).items()}
    folders["older copy"] = evaluation(tmp_path / "copy", copy, beside=False)
    named = {name: folders[name] for name in order}
    path = write_report(tmp_path / "report.md", {}, named)
    assert_tables_are_whole(path.read_text())
    text = section(path)
    [heading] = rows_of(text, "truthfulqa")
    for name in order:  # from the items, which have what it takes
        [cells] = rows_of(text, "truthfulqa_mc1", name)
        assert cells[heading.index("length normalised")]
    comparison = compare_evaluations(*named.values())
    one_is_new = order != ("older", "older copy")
    assert ("truthfulqa_mc1_pmi" in comparison["beside_only_in_one"]) == one_is_new
    assert ("is older" in text) == one_is_new
    print_comparison(comparison)
    assert ("in one of them only, which may be older" in capsys.readouterr().out) == one_is_new
    json.dumps(comparison["beside"])


def test_terminal_shows_the_rules(folders, capsys):
    results = read_results(folders["base"])
    print_results(results, folders["base"])
    out = " ".join(capsys.readouterr().out.split())
    overlap = 100 * results["truthfulqa_mc1"]["rules"]["least overlap"]["acc"]
    assert "truthfulqa_mc1 without the question: longest" in out
    assert f"least overlap {overlap:.1f}" in out


def test_equal_models_differ_nowhere(folders):
    comparison = compare_evaluations(folders["base"], folders["base"])
    for rows in comparison["beside"].values():
        for row in rows.values():
            assert row["difference"] == 0 and np.allclose(row["interval"], 0)
