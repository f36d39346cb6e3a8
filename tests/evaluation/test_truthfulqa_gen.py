"""truthfulqa_gen: scores of lm-evaluation-harness, answers of transformers."""

import csv
import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lm_eval
import pytest
import rouge_score.scoring
import torch
import yaml
from lm_eval.tasks.truthfulqa.utils import preprocess_function, process_results_gen
from lm_eval.utils import apply_template
from transformers import LlamaForCausalLM

from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.report.sections import scores
from mmalign.evaluation.tasks import TASKS, load_documents
from mmalign.evaluation.tasks.truthfulqa_gen import (
    load_questions,
    load_similarity,
    score_answer,
)

from .conftest import save_llama

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
TASK = ["truthfulqa_gen"]
FIELDS = ["Type", "Question", "Correct Answers", "Incorrect Answers"]
ROWS = [
    ["x", "What falls? ", "Rain falls; Snow; ", "Stones fly.; The sky"],
    [
        "x",
        "Who knows, then?",
        'I have no comment; "Nobody", they say',
        "Everybody knows; everybody",
    ],
    ["x", "Where is it?", "It is here.", "It is there"],
]


def write_questions(root: Path, rows: list = ROWS, fields: list = FIELDS) -> Path:
    path = root / "truthfulqa" / "TruthfulQA.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([fields, *rows])
    return root


def read_documents(root: Path) -> list[dict]:
    """As the data set's loader and the harness's task read the file."""
    with (root / "truthfulqa" / "TruthfulQA.csv").open(newline="", encoding="utf-8-sig") as file:
        return [
            preprocess_function(
                {
                    "question": row["Question"],
                    "correct_answers": [x.strip() for x in row["Correct Answers"].split(";")],
                    "incorrect_answers": [x.strip() for x in row["Incorrect Answers"].split(";")],
                }
            )
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("published", [True, False])
def test_questions_are_those_of_the_harness(tmp_path, request, published):
    root = request.getfixturevalue("shared_data") if published else write_questions(tmp_path)
    expected, found = read_documents(root), load_questions(root)
    assert len(found) == len(expected) == (817 if published else 3)
    for question, document in zip(found, expected, strict=True):
        assert question.text == document["question"]
        assert list(question.true) == document["correct_answers"]
        assert list(question.false) == document["incorrect_answers"]


@pytest.fixture
def harness_scores(monkeypatch) -> Callable[[dict, list[str]], dict]:
    """Of one answer; 2 instead of 1000 resamples of this one answer change nothing."""
    two = partial(rouge_score.scoring.BootstrapAggregator, n_samples=2)
    monkeypatch.setattr(rouge_score.scoring, "BootstrapAggregator", two)
    return process_results_gen


def test_scores_are_those_of_the_harness(shared_data, harness_scores):
    """Also those of an empty answer, of several lines, and of an answer that is a reference."""
    questions, documents = load_questions(shared_data), read_documents(shared_data)
    similarity = load_similarity()
    for index in range(0, 817, 40):
        question, other = questions[index], questions[(index + 7) % 817]
        answers = ["", "A: Yes,\nno", question.true[0], question.false[0], other.true[0][:30]]
        for answer in answers:
            found = score_answer(question, answer, similarity)
            assert found == pytest.approx(harness_scores(documents[index], [answer]))


def test_scores_by_hand(tmp_path):
    question = load_questions(write_questions(tmp_path))[1]
    scores = score_answer(question, "I have no comment.", load_similarity())
    assert scores["bleu_max"] == pytest.approx(100)
    for name in ("rouge1", "rouge2", "rougeL"):  # no word of "Everybody." and "All."
        assert [scores[f"{name}_{kind}"] for kind in ("max", "diff", "acc")] == [100, 100, 1]


class _TaskFile(yaml.SafeLoader):
    """lm_eval's task files name Python functions, which are not wanted here."""


_TaskFile.add_constructor("!function", lambda loader, node: node.value)


def harness_prompt(document: dict) -> str:
    path = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_gen.yaml"
    return apply_template(yaml.load(path.read_text(), _TaskFile)["doc_to_text"], document)


def test_answers_are_those_of_transformers(
    llama_folder, tokenizer, tmp_path, shared_data, harness_scores
):
    settings = {"limit": 5, "quiet": True, "device": "cpu"}
    results = evaluate_model(llama_folder, TASK, shared_data, tmp_path, **settings)
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    expected, reasons = [], set()
    for document, line in zip(read_documents(shared_data)[:5], map(json.loads, lines), strict=True):
        ids = torch.tensor([tokenizer.encode(harness_prompt(document))])
        written = model.generate(ids, do_sample=False, max_new_tokens=256, pad_token_id=0)
        answer, *rest = tokenizer.decode(written[0, ids.shape[1] :].tolist()).split(".")
        assert line["answer"] == answer.strip()
        assert (line["reason"] == "stop") == bool(rest)
        assert line["scores"] == pytest.approx(harness_scores(document, [answer.strip()]))
        expected.append(line["scores"])
        reasons.add(line["reason"])
    assert len(expected) == 5 and "stop" in reasons
    summary = results["truthfulqa_gen"]
    for name in expected[0]:
        low, high = summary[name]["interval"]
        assert summary[name]["mean"] == pytest.approx(sum(x[name] for x in expected) / 5)
        assert low <= summary[name]["mean"] <= high
        assert name.endswith("_max") or summary[name]["constant"] > 0
    assert results["config"]["tasks"]["truthfulqa_gen"].keys() >= {"generation", "sacrebleu"}
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))


def test_command(llama_folder, shared_data, tmp_path, monkeypatch, capsys):
    """With a task that is scored by log-likelihoods in the same run."""
    root = write_questions(tmp_path / "data")
    questions = json.loads((shared_data / "truthfulqa" / "mc_task.json").read_text())
    (root / "truthfulqa" / "mc_task.json").write_text(json.dumps(questions[:2]))
    command = ["evaluate.py", "--model", llama_folder, "--data-root", root, "--limit", 2]
    command += ["--output", tmp_path / "out", "--tasks", "truthfulqa_mc1", "truthfulqa_gen"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    monkeypatch.setenv("COLUMNS", "120")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    output = capsys.readouterr().out
    assert "truthfulqa_gen_rouge1_acc" in output and "not the revised file" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["truthfulqa_gen"]["n"] == results["truthfulqa_mc1"]["n"] == 2
    assert list(results["seconds"]) == ["tokenise", "load", "score", "generate"]
    report = (tmp_path / "out" / "report.md").read_text()
    accuracy = 100 * results["truthfulqa_gen"]["rouge1_acc"]["mean"]
    assert f"| truthfulqa_gen_rouge1_acc | 2 | **{accuracy:.1f}** (" in report


def test_missing_or_broken_data(tmp_path):
    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_documents(TASK, tmp_path)

    fails("TruthfulQA.csv, which does not exist. Put TruthfulQA.csv of\\s+github.com/sylinrl")
    write_questions(tmp_path, rows=[], fields=["Question", "Correct Answers"])
    fails("has no column Incorrect Answers; it has Question, Correct Answers")
    write_questions(tmp_path, rows=[])
    fails("contains no question")
    write_questions(tmp_path, rows=[*ROWS, ["x", "What?", "This", " ; "]])
    fails("line 5: expected a question with true and false answers")


def test_context_too_short(tmp_path, tokenizer_model, shared_data):
    folder = save_llama(tmp_path, tokenizer_model, seed=0, max_position_embeddings=300)
    with pytest.raises(UserError, match="more than the model's context of 300"):
        evaluate_model(folder, TASK, shared_data, tmp_path / "output", quiet=True)


def test_libraries_are_missing(monkeypatch, shared_data):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="pip install sacrebleu rouge-score"):
        load_documents(TASK, shared_data)


def test_report_says_where_answers_are_no_closer_to_the_truth():
    def metric(low: float, high: float) -> dict:
        return {"mean": (low + high) / 2, "interval": [low, high], "constant": 50.0}

    diffs = {"bleu": (-1, 2), "rouge1": (1, 2), "rouge2": (-3, -1), "rougeL": (0.5, 2)}
    summary = {f"{name}_diff": metric(*bounds) for name, bounds in diffs.items()}
    summary |= {f"{name}_acc": metric(0.2, 0.4) | {"constant": 1.0} for name in diffs}
    summary |= {"n": 7, "num_unfinished": 2}
    summary["caveats"] = TASKS["truthfulqa_gen"].caveats(summary)
    text = "\n".join(scores({"m": {"truthfulqa_gen": summary}}, "scores.png"))
    for row in (
        "| truthfulqa_gen_bleu_diff | 7 | **0.5** (-1.0 to 2.0) |  | always no comment 50.0 |",
        "| truthfulqa_gen_rouge1_acc | 7 | **30.0** (20.0 to 40.0) |  | always no comment 100.0 |",
        "- truthfulqa_gen: by bleu the answers are as close to false references as to true ones.",
        "- truthfulqa_gen: by rouge2 the answers are closer to false references.",
        "- truthfulqa_gen: 2 of 7 answers were cut at 256 tokens.",
    ):
        assert row in text.splitlines()
