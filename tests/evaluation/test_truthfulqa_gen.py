"""TruthfulQA's written answers: scores of lm-evaluation-harness, answers of transformers."""

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
from mmalign.evaluation.report.written import written_answers
from mmalign.evaluation.written_answers import evaluate_written_answers
from transformers import LlamaForCausalLM

from mmalign.errors import UserError
from mmalign.evaluation.tasks.truthfulqa_gen import (
    load_questions,
    load_similarity,
    score_answer,
)

from .conftest import save_llama

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
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
    questions, documents = load_questions(shared_data, 817), read_documents(shared_data)
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
    results = evaluate_written_answers(llama_folder, shared_data, tmp_path, **settings)
    lines = (tmp_path / "truthfulqa_gen.jsonl").read_text().splitlines()
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
    written = json.loads((tmp_path / "truthfulqa_gen.json").read_text())
    assert written == json.loads(json.dumps(results))


def test_command(llama_folder, shared_data, tmp_path, monkeypatch, capsys):
    """Together with a task that is scored by log-likelihoods."""
    root = write_questions(tmp_path / "data")
    questions = json.loads((shared_data / "truthfulqa" / "mc_task.json").read_text())
    (root / "truthfulqa" / "mc_task.json").write_text(json.dumps(questions[:2]))
    command = ["evaluate.py", "--model", llama_folder, "--data-root", root, "--limit", 2]
    command += ["--output", tmp_path / "out", "--tasks", "truthfulqa_mc1", "truthfulqa_gen"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    monkeypatch.setenv("COLUMNS", "120")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    output = capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").is_file()
    assert "2 questions" in output and "not the revised file" in output
    results = json.loads((tmp_path / "out" / "truthfulqa_gen.json").read_text())
    assert results["truthfulqa_gen"]["n"] == 2
    report = (tmp_path / "out" / "report.md").read_text()
    accuracy = 100 * results["truthfulqa_gen"]["rouge1_acc"]["mean"]
    assert f"| rouge1_acc | {accuracy:.1f} (" in report


def test_missing_or_broken_data(tmp_path):
    def fails(message: str, **settings) -> None:
        with pytest.raises(UserError, match=message):
            load_questions(tmp_path, **settings)

    fails("TruthfulQA.csv does not exist. It is TruthfulQA.csv of github.com/sylinrl")
    write_questions(tmp_path, rows=[], fields=["Question", "Correct Answers"])
    fails("has no column Incorrect Answers; it has Question, Correct Answers")
    write_questions(tmp_path, rows=[])
    fails("holds no question")
    write_questions(tmp_path, rows=[*ROWS, ["x", "What?", "This", " ; "]])
    fails("line 5: a question needs true and false answers")
    write_questions(tmp_path)
    fails("limit is 0", limit=0)


def test_context_too_short(tmp_path, tokenizer_model, shared_data):
    folder = save_llama(tmp_path, tokenizer_model, seed=0, max_position_embeddings=300)
    with pytest.raises(UserError, match="context of 300 does not hold"):
        evaluate_written_answers(folder, shared_data, tmp_path / "output", quiet=True)


def test_libraries_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="pip install sacrebleu rouge-score"):
        load_similarity()


def test_report_says_where_answers_are_no_closer_to_the_truth(tmp_path):
    """And leaves out written answers of other weights."""

    def metric(low: float, high: float) -> dict:
        return {"mean": (low + high) / 2, "interval": [low, high], "constant": 50.0}

    diffs = {"bleu": (-1, 2), "rouge1": (1, 2), "rouge2": (-3, -1), "rougeL": (0.5, 2)}
    summary = {f"{name}_diff": metric(*bounds) for name, bounds in diffs.items()}
    summary |= {f"{name}_acc": metric(0.2, 0.4) for name in diffs} | {"n": 7}
    written = {"truthfulqa_gen": summary, "config": {"weights": "here"}}
    (tmp_path / "truthfulqa_gen.json").write_text(json.dumps(written))
    folders, results = {"m": tmp_path}, {"m": {"config": {"weights": "here"}}}
    _, table, _, sentences = written_answers(folders, results)
    assert "| bleu_diff | 0.5 (-1.0 to 2.0) | 50.0 |" in table
    assert "| rouge1_acc | 30.0 (20.0 to 40.0) | 5000.0 |" in table
    assert sentences.splitlines() == [
        "- m: by bleu the answers are as close to false references as to true ones.",
        "- m: by rouge2 the answers are closer to false references.",
    ]
    assert written_answers(folders, {"m": {"config": {"weights": "there"}}}) == []
