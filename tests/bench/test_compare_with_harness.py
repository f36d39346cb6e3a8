"""evaluate.py's requests and scores against lm-evaluation-harness's own task files."""

from bench import compare_with_harness
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.tokenizer import Tokenizer
from tests.evaluation.conftest import save_llama


def test_the_harness_asks_and_scores_the_same(shared_data, tmp_path):
    model = save_llama(tmp_path, shared_data / "llama_tokenizer" / "tokenizer.model", seed=3)
    Tokenizer.from_pretrained(model).save(model)
    how = (9, 8192, "fp32", "cpu")
    evaluate_model(model, ("truthfulqa", "ethics"), shared_data, tmp_path / "scores", *how)
    arguments = (model, shared_data, [tmp_path / "scores"], 9, tmp_path / "cache")
    rows = compare_with_harness.rows(*arguments)
    assert rows == compare_with_harness.rows(*arguments)  # from the cache
    assert [row.task for row in rows] == list(compare_with_harness.TASKS)
    for row in rows:
        others = int(row.task == "ethics_deontology")  # the ninth ends with a blank
        assert (row.documents, row.asked_otherwise, row.judged_otherwise) == (9, others, 0), row
        assert row.furthest < 1e-4, row


def test_another_choice_and_another_request_are_counted():
    choices = [{"text": text, "loglikelihood": -1.0} for text in (" b", " c")]
    item = {"context": "a", "choices": choices, "prediction": 0, "score": 0.0}
    requests = [("a", " c"), ("a", " b")]
    sample = {"arguments": requests, "filtered_resps": [(-0.5, False), (-1.0, True)], "acc": 0.0}

    def compare(sample, ask):
        found = compare_with_harness.compare("ethics_virtue", [item], [sample], ask)
        return found.asked_otherwise, found.furthest, found.judged_otherwise

    assert compare(sample, None) == (0, 0.5, 1)
    assert compare(sample | {"filtered_resps": [(-1.0, 0), (-1.0, 0)], "acc": 1}, None) == (0, 0, 1)
    other = sample | {"arguments": [("a", " c"), ("a", " d")]}  # of no use; our requests count
    assert compare(other, lambda requests: dict.fromkeys(requests, -1.25)) == (1, 0.25, 0)
    assert compare(other, lambda requests: {("a", " b"): -3.0, ("a", " c"): -2.0}) == (1, 2, 1)
