"""Forgetting: the harness's own tasks through the adapter, document by document."""

from pathlib import Path

import lm_eval
import pytest

from mmalign.errors import UserError
from mmalign.files import read_json
from mmalign.lm_eval import MmalignLM
from mmalign.study.forgetting import (
    by_document,
    parse_task,
    path_of,
    require_tasks,
    score_forgetting,
)
from tests.evaluation.conftest import llama_folder, tokenizer_model  # noqa: F401  fixtures
from tests.evaluation.test_lm_eval_paper_tasks import documents  # noqa: F401  a fixture


@pytest.fixture
def model(llama_folder, documents) -> Path:  # noqa: F811
    return llama_folder


def test_the_mean_over_documents_is_the_harness_s_score(model, tmp_path):
    names = ["boolq:0"]
    score_forgetting(model, names, tmp_path)
    language_model = MmalignLM(pretrained=str(model))
    for name in names:
        task, shots = parse_task(name)
        results = lm_eval.simple_evaluate(
            model=language_model, tasks=[task], num_fewshot=shots, bootstrap_iters=0
        )["results"][task]
        ((metric, rows),) = read_json(path_of(tmp_path, name)).items()
        kind = metric.removeprefix(f"{task}_")
        expected = next(x for key, x in results.items() if key.split(",")[0] == kind)
        assert sum(rows["values"]) / len(rows["values"]) == pytest.approx(expected)
        assert rows["doc_ids"] == list(range(9))


def test_samples_of_the_harness():
    """One filter of several, subtasks numbered through, and SQuAD's pairs."""
    rows = [{"filter": x, "exact_match": y} for x in ("strict", "flexible") for y in (0.0, 1.0)]
    found = by_document("gsm8k", {"gsm8k": rows, "a_first": rows[1:2]})
    assert found == {"gsm8k_exact_match": {"doc_ids": [0, 1, 2], "values": [1.0, 0.0, 1.0]}}
    answers = {"answers": {"text": ["The red lamp."]}}, {"answers": {"text": []}}
    pairs = [
        (x, y) for y in answers for x in ({"prediction_text": "red lamp"}, {"prediction_text": ""})
    ]
    found = by_document("squadv2", {"squadv2": [{"exact": pair} for pair in pairs]})
    assert found["squadv2_exact"]["values"] == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="rouge has none of acc, exact_match"):
        by_document("rouge", {"rouge": [{"rouge1": 0.5}]})


def test_mistakes():
    with pytest.raises(UserError, match="'gsm8k:x'; expected TASK or TASK:SHOTS"):
        parse_task("gsm8k:x")


def test_a_task_that_the_harness_does_not_know_is_named_before_the_runs():
    require_tasks(["boolq:0", "mmlu"])
    with pytest.raises(UserError, match="no task 'boolqq:2'"):
        require_tasks(["boolq", "boolqq:2"])
