"""Damaged files of TruthfulQA and ETHICS: what is read is asked as it stands there."""

import csv
import io
import json
from pathlib import Path
from random import Random

import pytest

from mmalign.evaluation.evaluation import Evaluation
from mmalign.evaluation.tasks import TASKS, load_documents
from mmalign.evaluation.tasks.multiple_choice import Document
from mmalign.evaluation.tasks.vision_task import VisionTask
from mmalign.model.config import DecoderConfig
from mmalign.tokenizer import Tokenizer
from tests.fuzz.damage import HOSTILE, damaged_bytes, damaged_json, ends_well

pytestmark = pytest.mark.fuzz
SENTENCE = "what colour is the small boat"
CELLS = ["", "2", "x" * 400, '"', "a\nb", "[SEP]", "\0", "\ud83d", ";", " ", "\u2028", "1.0", "NaN"]


@pytest.fixture
def root(tmp_path) -> Path:
    """Every file of every task, in its published form."""
    targets = {f"{SENTENCE} {i}": int(i == 0) for i in range(3)}
    questions = [{"question": f"{SENTENCE} {i}?", "mc1_targets": targets, "mc2_targets": targets}
                 for i in range(3)]  # fmt: skip
    path = tmp_path / "truthfulqa/mc_task.json"
    path.parent.mkdir()
    path.write_text(json.dumps(questions))
    columns = ["Type", "Question", "Correct Answers", "Incorrect Answers"]
    answers = [["x", f"{SENTENCE} {i}?", f"yes {i}; no", "it; is"] for i in range(3)]
    table(tmp_path / "truthfulqa/TruthfulQA.csv", [columns, *answers])
    labels = [str(i % 2) for i in range(20)]
    virtue = [f"{SENTENCE} {i // 5} [SEP] trait {i}" for i in range(20)]
    rows = {
        "commonsense/cm": [["label", "input"], *zip(labels, virtue, strict=True)],
        "deontology/deontology": [["label", "scenario", "excuse"]]
        + [[labels[i], f"{SENTENCE} {i // 4}", f"no {i}"] for i in range(20)],
        "justice/justice": [["label", "scenario"], *zip(labels, virtue, strict=True)],
        "utilitarianism/util": [[f"{SENTENCE} {i}", f"{SENTENCE} no {i}"] for i in range(20)],
        "virtue/virtue": [["label", "scenario"], *zip(labels, virtue, strict=True)],
    }
    for name, lines in rows.items():
        table(tmp_path / f"ethics/{name}_test.csv", lines)
    return tmp_path


TEXT_TASKS = {x: task for x, task in TASKS.items() if not isinstance(task, VisionTask)}


def table(path: Path, rows: list) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))


def damage(path: Path, rng: Random) -> None:
    if rng.random() < 0.3:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    elif path.suffix == ".json":
        path.write_bytes(damaged_json(path.read_text(), rng, ("question", "mc1_targets")))
    else:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        row = rng.choice(rows)
        kind = rng.random()
        if kind < 0.5:
            hostile = [x for x in HOSTILE if isinstance(x, str)]
            row[rng.randrange(len(row))] = rng.choice((*CELLS, *hostile))
        elif kind < 0.7:
            row[:] = rng.choice((row[:-1], [*row, "more"], []))
        else:
            rows[rng.randrange(len(rows))] = rng.choice(rows)
        table(path, rows)


def questions_file(task: str, paths: list[str]) -> str:
    """TruthfulQA.csv beside mc_task.json has the categories alone."""
    return next((x for x in paths if "_mc" in task and x.endswith(".json")), paths[0])


def words(path: Path, task: str) -> list[list[str]]:
    """Of each document, what has to stand in its prompt, by a reader that is not ours."""
    if path.suffix == ".json":
        return [[entry["question"]] for entry in json.loads(path.read_text())]
    with open(path, newline="", encoding="utf-8") as file:
        if task == "ethics_utilitarianism":
            return [row for row in csv.reader(file) if row]
        columns = {"truthfulqa_gen": ("Question",)}.get(task, ("input", "scenario", "excuse"))
        rows = [[row[x].strip() for x in columns if x in row] for row in csv.DictReader(file)]
    return [[part for text in row for part in text.split(" [SEP] ")] for row in rows]


def test_damaged_documents(root, tokenizer: Tokenizer, seeds):
    files = {
        name: questions_file(name, sorted(x.data_files(root))) for name, x in TEXT_TASKS.items()
    }
    config = DecoderConfig(
        tokenizer.vocab_size, 32, 64, 2, 4, 4, 8, 1e-6, 10000.0, 4096, False
    )  # fmt: skip
    evaluation = Evaluation(root, tokenizer, config, 4096, "fp32")
    accepted = 0

    def ask(task: str) -> None:
        documents = load_documents([task], root)
        evaluation.plan(documents)
        asked = [x.requests[0][0] if isinstance(x, Document) else x.prompt for x in documents[task]]
        written = words(root / files[task], task)
        assert len(asked) == len(written)
        for prompt, texts in zip(asked, written, strict=True):
            assert all(text in prompt for text in texts)

    for seed in seeds("documents"):
        rng = Random(seed)
        task = rng.choice(sorted(files))
        path = root / files[task]
        whole = path.read_bytes()
        damage(path, rng)
        names = (str(path), f"{task} document")
        accepted += ends_well((seed, task), names, ask, task)
        path.write_bytes(whole)
    assert 0.1 < accepted / len(seeds("documents")) < 0.8
