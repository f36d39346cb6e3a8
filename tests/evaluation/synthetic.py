"""Evaluation outputs with given answers, and run folders, without a model."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.evaluation.beside import summarize_beside
from mmalign.evaluation.items import PROTOCOL, write_items
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.tasks import TASKS, summarize
from mmalign.evaluation.tasks.multiple_choice import Document
from mmalign.evaluation.tasks.truthfulqa_gen import SIMILARITIES
from mmalign.system import versions

Answers = dict[str, Sequence[tuple[int, int]]]  # task -> (right choice, the model's) per document


def make_evaluation(folder: Path, answers: Answers, diffs: Sequence[float] = (), **config) -> Path:
    """Documents of ETHICS, two choices each; config replaces settings.

    diffs: differences of similarity, in points and by every metric, of generated answers.
    """
    items = {task: _items(task, pairs) for task, pairs in answers.items()}
    if len(diffs):
        items["truthfulqa_gen"] = [_generated_item(i, diff) for i, diff in enumerate(diffs)]
    settings = {
        "model": folder.name,
        **PROTOCOL,
        "tasks": {task: TASKS[task].protocol() for task in items},
        "limit": None,
        "precision": "fp32",
        "max_length": 64,
        "num_requests": 2 * sum(map(len, answers.values())),
        "tokenizer": "tokenizer.model, 32,000 tokens",
        "tokenizer_sha256": "1" * 64,
        "versions": versions(),
        "data_files": {"ethics/virtue/virtue_test.csv": {"sha256": "0" * 64}},
    }
    results = summarize(items)
    for task, rows in summarize_beside(items).items():
        results[task]["beside"] = rows
    cost = {"seconds": {"load": 1.0, "tokenise": 1.0, "score": 1.0}, "tokens_computed": 1}
    write_items(folder, items, results | cost | {"config": settings | config})
    return folder


def _items(task: str, pairs: Sequence[tuple[int, int]]) -> list[dict]:
    size, answers = TASKS[task].group_size, TASKS[task].answers
    items = []
    for i, (gold, chosen) in enumerate(pairs):
        requests = tuple((f"question {i}", answer) for answer in answers)
        document = Document(task, i, requests, gold, None if size is None else i // size)
        scores = [Score(-1.0 if choice == chosen else -2.0, 1, 0) for choice in (0, 1)]
        items.append(TASKS[task].make_item(document, scores))
    return items


def _generated_item(index: int, diff: float) -> dict:
    scores = {f"{name}_max": 50.0 for name in SIMILARITIES}
    scores |= {f"{name}_diff": diff for name in SIMILARITIES}
    scores |= {f"{name}_acc": float(diff > 0) for name in SIMILARITIES}
    return {
        "task": "truthfulqa_gen",
        "doc_id": index,
        "question": f"question {index}",
        "answer": "A: yes",
        "reason": "stop",
        "scores": scores,
        "constant_scores": dict.fromkeys(scores, 0.0),
        "sha256": f"{index:08}",
    }


def make_run(folder: Path, num_steps: int = 60) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": {"template": "v1"}, "seed": 7}))
    lines = [
        {"step": i, "loss": 3 / i, "tokens": 100, "samples": 4, "tokens_per_second": 500.0}
        for i in range(1, num_steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 61, "lo')  # torn by a kill
    return folder
