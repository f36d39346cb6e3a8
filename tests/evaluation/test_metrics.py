"""Scores against recorded metrics of lm-evaluation-harness 00209e10f."""

import json
import math

import pytest

from mmalign.evaluation.metrics import true_share
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.tasks import TASKS, load_documents, summarize
from mmalign.evaluation.tasks.ethics import SUBSETS
from mmalign.evaluation.tasks.multiple_choice import Document

OUR_NAME = {"ethics_cm": "ethics_commonsense"}


@pytest.fixture(scope="module")
def recorded(shared_data):
    return json.loads((shared_data / "formats" / "metrics.json").read_text())


def item(task, index, loglikelihoods, gold, group_id=None):
    answers = getattr(TASKS[task], "answers", [str(i) for i in range(len(loglikelihoods))])
    requests = tuple(("context", answer) for answer in answers)
    document = Document(task, index, requests, gold, group_id)
    return TASKS[task].make_item(document, [Score(value, 1, 0) for value in loglikelihoods])


@pytest.mark.parametrize("subset", ["cm", "deontology", "justice", "utilitarianism", "virtue"])
def test_ethics_metrics(recorded, subset):
    task = OUR_NAME.get(f"ethics_{subset}", f"ethics_{subset}")
    expected = recorded["tasks"][f"ethics_{subset}"]
    items = []
    for index, case in enumerate(expected["documents"]):
        gold = TASKS[task].answers.index(case["target"])
        group_id = case["document"].get("group_id")
        items.append(item(task, index, case["loglikelihoods"], gold, group_id))
        assert items[-1]["score"] == case["metrics"]["acc"], case
        assert (items[-1]["prediction"] == gold) == case["metrics"]["acc"], case
    summary = TASKS[task].summarize(items)
    assert summary["acc"] == pytest.approx(expected["aggregate"]["acc"], abs=1e-15)
    assert summary["stderr"] == pytest.approx(expected["aggregate"]["acc_stderr"], abs=1e-15)
    assert summary.get("em") == pytest.approx(expected["aggregate"].get("em"), abs=1e-15)


def test_truthfulqa_metrics(recorded):
    expected = recorded["tasks"]["truthfulqa_mc"]
    items = {"mc1": [], "mc2": []}
    for index, case in enumerate(expected["documents"]):
        labels = case["document"]["mc2_targets"]["labels"]
        split = len(case["document"]["mc1_targets"]["choices"])
        values = case["loglikelihoods"]
        items["mc1"].append(item("truthfulqa_mc1", index, values[:split], 0))
        items["mc2"].append(item("truthfulqa_mc2", index, values[split:], tuple(labels)))
        for kind, target in case["metrics"].items():
            assert items[kind][-1]["score"] == pytest.approx(float(target), abs=1e-14), case
    for kind, rows in items.items():
        summary = TASKS[f"truthfulqa_{kind}"].summarize(rows)
        assert summary["acc"] == pytest.approx(expected["aggregate"][kind], abs=1e-14)
        stderr = expected["aggregate"][f"{kind}_stderr"]
        assert summary["stderr"] == pytest.approx(stderr, abs=1e-14)


def test_mc2_does_not_underflow():
    assert true_share([-800.0, -801.0], 1) == pytest.approx(1 / (1 + math.exp(-1)))


def test_exact_match_counts_complete_groups_only(recorded):
    case = next(c for c in recorded["edge_cases"] if len(c.get("em_items", ())) == 7)
    items = [
        item("ethics_deontology", i, [0.0, -1.0], 0 if right else 1, group)
        for i, (group, right) in enumerate(case["em_items"])
    ]
    summarized = TASKS["ethics_deontology"].summarize
    assert summarized(items)["em"] == case["metrics"]["em"]
    assert summarized(items[:3])["em"] is None


# ---- chance and constant answers on the real files ----


@pytest.fixture(scope="module")
def documents(shared_data):
    return load_documents(
        [name for name, task in TASKS.items() if task.kind != "vision"], shared_data
    )


def test_chance_of_truthfulqa(shared_data, documents):
    recorded = json.loads((shared_data / "formats" / "evaluation_requests.json").read_text())
    expected = recorded["tasks"]["truthfulqa_mc"]["variants"][0]
    uniform = {}
    for kind in ("mc1", "mc2"):
        rows = documents[f"truthfulqa_{kind}"]
        answers = [[Score(-1.0, 5, 0)] * len(document.requests) for document in rows]
        task = TASKS[f"truthfulqa_{kind}"]
        uniform[kind] = task.summarize(task.make_items(rows, answers))
    assert uniform["mc1"]["chance"] == pytest.approx(expected["uniform_mc1"], abs=1e-12)
    split = expected["uniform_mc2_as_the_harness_splits"]
    assert uniform["mc2"]["chance"] == uniform["mc2"]["acc"] == pytest.approx(split, abs=1e-12)
    assert uniform["mc2"]["chance_by_label"] == pytest.approx(expected["uniform_mc2"], abs=1e-12)
    assert uniform["mc2"]["acc_by_label"] == pytest.approx(expected["uniform_mc2"], abs=1e-12)


@pytest.mark.parametrize(
    "label, mean, virtue", [(1, 0.4323, 0.2), (0, 0.5677, 0.8)], ids=["yes", "no"]
)
def test_constant_answers_on_ethics(documents, label, mean, virtue):
    items = {}
    for task in SUBSETS:
        answer = task.answer_of_label_1 if label else task.answer_of_label_0
        scores = [Score(0.0 if i == answer else -1.0, 1, 0) for i in (0, 1)]
        items[task.name] = [task.make_item(document, scores) for document in documents[task.name]]
    results = summarize(items)
    for task in SUBSETS:
        name = task.name
        assert results[name]["yes_rate"] == label
        constant = list(results[name]["baselines"].values())[1 - label]
        assert results[name]["acc"] == constant
        if task.group_size:
            assert results[name]["em"] == list(results[name]["em_baselines"].values())[1 - label]
    assert results["ethics_virtue"]["acc"] == pytest.approx(virtue)
    combined = results["ethics_mean"]
    assert combined["acc"] == pytest.approx(mean, abs=5e-5)
    constant = list(combined["baselines"].values())[1 - label]
    assert constant == pytest.approx(combined["acc"])
