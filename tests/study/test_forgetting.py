"""Forgetting: the harness's own tasks through the adapter, document by document."""

import lm_eval
import pytest

from mmalign.errors import UserError
from mmalign.files import read_json
from mmalign.lm_eval import MmalignLM
from mmalign.study.forgetting import parse_task, path_of, score_forgetting
from tests.evaluation.conftest import llama_folder, tokenizer_model  # noqa: F401  fixtures
from tests.evaluation.test_lm_eval_paper_tasks import documents  # noqa: F401  a fixture


def test_the_mean_over_documents_is_the_harness_s_score(
    llama_folder,
    documents,
    tmp_path,  # noqa: F811
):
    names = ["boolq:0", "mathqa:2", "gsm8k:1"]
    score_forgetting(llama_folder, names, tmp_path)
    model = MmalignLM(pretrained=str(llama_folder))
    for name in names:
        task, shots = parse_task(name)
        results = lm_eval.simple_evaluate(
            model=model, tasks=[task], num_fewshot=shots, bootstrap_iters=0
        )["results"][task]
        ((metric, rows),) = read_json(path_of(tmp_path, name)).items()
        kind = metric.removeprefix(f"{task}_")
        expected = next(x for key, x in results.items() if key.split(",")[0] == kind)
        assert sum(rows["values"]) / len(rows["values"]) == pytest.approx(expected)
        assert rows["doc_ids"] == list(range(9))


def test_squad(llama_folder, documents, tmp_path):  # noqa: F811
    score_forgetting(llama_folder, ["squadv2:0"], tmp_path)
    ((metric, rows),) = read_json(tmp_path / "squadv2-0.json").items()
    assert metric == "squadv2_exact" and set(rows["values"]) <= {0.0, 1.0}


def test_mistakes():
    with pytest.raises(UserError, match="'gsm8k:x'; expected TASK or TASK:SHOTS"):
        parse_task("gsm8k:x")
