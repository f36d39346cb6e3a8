"""Paired comparison of two evaluations: the same documents, two models."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.intervals import (
    NUM_RESAMPLES,
    bootstrap_means,
    holm,
    mcnemar_p,
    percentile_interval,
)
from mmalign.evaluation.metrics import exact_match
from mmalign.evaluation.tasks import ETHICS_TASKS, TASKS, Task

METHOD = (
    f"paired percentile bootstrap, {NUM_RESAMPLES:,} resamples of documents (of whole groups in "
    "deontology, justice and virtue); p: exact McNemar test, Holm-corrected over the tasks, which "
    "takes all documents as independent (where they come in groups, trust the interval)"
)


def compare_evaluations(dir_a: str | Path, dir_b: str | Path) -> dict:
    """What changed from evaluation output A to B, per task that both hold.

    Returns {"a": folder, "b": folder, "method": text, "only_in_one": tasks that one lacks,
    "tasks": {task: {"acc_a", "acc_b", "difference", "interval" (95%), "n", and for tasks with
    right and wrong answers "lost", "gained" (documents), "p", "p_holm"}}}. Differences are B - A.
    Raises UserError where a folder is no evaluation or the documents differ.
    """
    items_a, items_b = read_items(dir_a), read_items(dir_b)
    shared = [task for task in TASKS if task in items_a and task in items_b]
    if not shared:
        raise UserError(f"{dir_a} and {dir_b} have no task in common")
    tasks, draws = {}, {}
    for seed, task in enumerate(shared):
        _require_same_documents(task, items_a[task], items_b[task])
        tasks[task], draws[task] = _compare_task(TASKS[task], items_a[task], items_b[task], seed)
    if all(task in tasks for task in ETHICS_TASKS):
        tasks["ethics_mean"] = _compare_mean(tasks, draws)
    tested = [task for task in tasks if "p" in tasks[task]]
    for task, corrected in zip(tested, holm([tasks[t]["p"] for t in tested]), strict=True):
        tasks[task]["p_holm"] = corrected
    return {
        "a": str(dir_a),
        "b": str(dir_b),
        "method": METHOD,
        "only_in_one": sorted(set(items_a) ^ set(items_b)),
        "tasks": tasks,
    }


def read_items(folder: str | Path) -> dict[str, list[dict]]:
    """items.jsonl of an evaluation output, by task."""
    path = Path(folder) / "items.jsonl"
    if not path.is_file() or not (Path(folder) / "results.json").is_file():
        raise UserError(
            f"{folder} is not a finished evaluation: it needs results.json and items.jsonl, as "
            "scripts/evaluate.py writes them"
        )
    items: dict[str, list[dict]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            item = json.loads(line)
            items.setdefault(item["task"], []).append(item)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not an item of an evaluation") from error
    return items


def _require_same_documents(task: str, items_a: Sequence[dict], items_b: Sequence[dict]) -> None:
    if len(items_a) != len(items_b):
        raise UserError(
            f"{task}: {len(items_a)} documents against {len(items_b)}; evaluate both models with "
            "the same files and the same --limit"
        )
    for a, b in zip(items_a, items_b, strict=True):
        if (a["doc_id"], a["sha256"], a["gold"]) != (b["doc_id"], b["sha256"], b["gold"]):
            raise UserError(
                f"{task} document {a['doc_id']}: the two evaluations did not score the same text "
                f"(sha256 {a['sha256']} against {b['sha256']}); evaluate both on the same files"
            )


def _compare_task(
    task: Task, items_a: Sequence[dict], items_b: Sequence[dict], seed: int
) -> tuple[dict, np.ndarray]:
    scores_a, scores_b = ([item["score"] for item in items] for items in (items_a, items_b))
    difference = np.subtract(scores_b, scores_a)  # (num_documents,)
    groups = [item.get("group_id", i) for i, item in enumerate(items_a)]
    draws = bootstrap_means(difference, groups, seed)
    comparison = {
        "acc_a": float(np.mean(scores_a)),
        "acc_b": float(np.mean(scores_b)),
        "difference": float(difference.mean()),
        "interval": percentile_interval(draws),
        "n": len(difference),
    }
    if task.name != "truthfulqa_mc2":
        lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
        comparison |= {"lost": lost, "gained": gained, "p": mcnemar_p(lost, gained)}
    if task.answers:
        changed = [
            a["prediction"] != b["prediction"] for a, b in zip(items_a, items_b, strict=True)
        ]
        comparison["answers_changed"] = sum(changed)
    if task.group_size:
        comparison["em_a"] = exact_match(task, items_a, scores_a)
        comparison["em_b"] = exact_match(task, items_b, scores_b)
    return comparison, draws


def _compare_mean(tasks: dict[str, dict], draws: dict[str, np.ndarray]) -> dict:
    """The five subsets are independent samples, so their resamples combine as they are."""
    subsets = [tasks[task] for task in ETHICS_TASKS]
    mean = {
        key: float(np.mean([subset[key] for subset in subsets]))
        for key in ("acc_a", "acc_b", "difference")
    }
    interval = percentile_interval(np.mean([draws[task] for task in ETHICS_TASKS], axis=0))
    return mean | {"interval": interval}
