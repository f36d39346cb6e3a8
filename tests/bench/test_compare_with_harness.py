"""evaluate.py's requests and scores against lm-evaluation-harness's own task files."""

from bench import compare_with_harness
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.tokenizer import Tokenizer
from tests.evaluation.conftest import save_llama


def test_the_harness_asks_and_scores_the_same(shared_data, tmp_path):
    model = save_llama(tmp_path, shared_data / "llama_tokenizer" / "tokenizer.model", seed=3)
    Tokenizer.from_pretrained(model).save(model)
    how = (4, 8192, "fp32", "cpu")
    evaluate_model(model, ("truthfulqa", "ethics"), shared_data, tmp_path / "scores", *how)
    rows = list(compare_with_harness.rows(model, shared_data, [tmp_path / "scores"], limit=4))
    assert [row.task for row in rows] == list(compare_with_harness.TASKS)
    for row in rows:
        assert (row.documents, row.asked_otherwise, row.judged_otherwise) == (4, 0, 0), row
        assert row.furthest < 1e-4, row


def test_another_choice_and_another_request_are_counted():
    choices = [{"text": text, "loglikelihood": -1.0} for text in (" b", " c")]
    item = {"context": "a", "choices": choices, "prediction": 0, "score": 0.0}
    requests = [("a", " c"), ("a", " b")]
    sample = {"arguments": requests, "filtered_resps": [(-0.5, False), (-1.0, True)], "acc": 0.0}
    found = compare_with_harness.compare("ethics_virtue", [item], [sample])
    assert (found.asked_otherwise, found.furthest, found.judged_otherwise) == (0, 0.5, 1)
    other = sample | {"arguments": [("a", " c"), ("a", " d")]}
    assert compare_with_harness.compare("ethics_virtue", [item], [other]).asked_otherwise == 1
