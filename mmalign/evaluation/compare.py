"""Paired comparison of two evaluations: the same documents, two models."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.compare_written import compare_written
from mmalign.evaluation.items import PROTOCOL, read_items, read_results, read_written
from mmalign.evaluation.metrics import exact_match
from mmalign.evaluation.paired import compare_scores
from mmalign.evaluation.statistics import NUM_RESAMPLES, holm, percentile_interval
from mmalign.evaluation.tasks import ETHICS_TASKS, GENERATION_TASK, TASKS, Task

METHOD = (
    f"paired percentile bootstrap, {NUM_RESAMPLES:,} resamples of documents (of whole groups in "
    "deontology, justice and virtue); p: exact McNemar test, Holm-corrected over all tests, which "
    "takes all documents as independent (where they come in groups, trust the interval)"
)


def compare_evaluations(dir_a: str | Path, dir_b: str | Path) -> dict:
    """What changed from evaluation output A to B, per task that both hold.

    Returns {"a": folder, "b": folder, "method": text, "only_in_one": tasks that one lacks,
    "settings": those that differ, [A's, B's] each, "tasks": {task: {"acc_a", "acc_b", "difference",
    "interval" (95%), "n", and for tasks with right and wrong answers "lost", "gained" (documents),
    "p", "p_holm"}}, "flipped": those documents, with their text}. Differences are B - A. Written
    answers have a row for every metric, as compare_written names them, and are not in "flipped".
    Raises UserError where a folder is no evaluation, or what was asked differs: documents, their
    number, prompts or the way to score.
    """
    results_a, results_b = read_results(dir_a), read_results(dir_b)
    settings = _differing_settings(dir_a, dir_b, results_a["config"], results_b["config"])
    items_a, items_b = read_items(dir_a), read_items(dir_b)
    shared = [task for task in TASKS if task in items_a and task in items_b]
    if not shared:
        raise UserError(f"{dir_a} and {dir_b} have no task in common")
    tasks, draws, flipped = {}, {}, []
    for seed, task in enumerate(shared):
        _require_same_documents(task, items_a[task], items_b[task])
        tasks[task], draws[task] = _compare_task(TASKS[task], items_a[task], items_b[task], seed)
        flipped += _flipped(TASKS[task], items_a[task], items_b[task])
    if all(task in tasks for task in ETHICS_TASKS):
        tasks["ethics_mean"] = _compare_mean(tasks, draws)
    only_in_one = set(items_a) ^ set(items_b)
    written_a, written_b = read_written(dir_a, results_a), read_written(dir_b, results_b)
    if written_a and written_b:
        tasks |= compare_written(dir_a, dir_b, written_a["config"], written_b["config"])
    elif written_a or written_b:
        only_in_one.add(GENERATION_TASK)
    tested = [task for task in tasks if "p" in tasks[task]]
    for task, corrected in zip(tested, holm([tasks[t]["p"] for t in tested]), strict=True):
        tasks[task]["p_holm"] = corrected
    return {
        "a": str(dir_a),
        "b": str(dir_b),
        "method": METHOD,
        "only_in_one": sorted(only_in_one),
        "settings": settings,
        "tasks": tasks,
        "flipped": flipped,
    }


def _differing_settings(dir_a: str | Path, dir_b: str | Path, a: dict, b: dict) -> dict[str, list]:
    """Precision, tokenizer and what else may differ between two models, of their configs."""
    for key in PROTOCOL:
        if a[key] != b[key]:
            raise UserError(
                f"{dir_a} and {dir_b} did not ask the same: {key} is {a[key]!r} and {b[key]!r}; "
                "evaluate both with one version of this program"
            )
    keys = ("precision", "tokenizer_sha256", "max_length")
    differing = {key: [a[key], b[key]] for key in keys if a[key] != b[key]}
    for package in sorted(a["versions"].keys() | b["versions"].keys()):
        found = [config["versions"].get(package) for config in (a, b)]
        if found[0] != found[1]:
            differing[package] = found
    return differing


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
    groups = [item.get("group_id", i) for i, item in enumerate(items_a)]
    comparison, draws = compare_scores(scores_a, scores_b, groups, seed, task.right_or_wrong)
    if task.answers:
        changed = [
            a["prediction"] != b["prediction"] for a, b in zip(items_a, items_b, strict=True)
        ]
        comparison["answers_changed"] = sum(changed)
    if task.group_size:
        comparison["em_a"] = exact_match(task, items_a, scores_a)
        comparison["em_b"] = exact_match(task, items_b, scores_b)
    return comparison, draws


def _flipped(task: Task, items_a: Sequence[dict], items_b: Sequence[dict]) -> list[dict]:
    """Documents that turned wrong ("lost") or right ("gained"), with their text."""
    pairs = [
        (a, b)
        for a, b in zip(items_a, items_b, strict=True)
        if task.right_or_wrong and a["score"] != b["score"]
    ]
    return [
        {
            "task": task.name,
            "doc_id": a["doc_id"],
            "turned": "gained" if b["score"] > a["score"] else "lost",
            "context": a["context"],
            "choices": [choice["text"] for choice in a["choices"]],
            "gold": a["gold"],
            "prediction_a": a["prediction"],
            "prediction_b": b["prediction"],
        }
        for a, b in pairs
    ]


def _compare_mean(tasks: dict[str, dict], draws: dict[str, np.ndarray]) -> dict:
    """The five subsets are independent samples, so their resamples combine as they are."""
    subsets = [tasks[task] for task in ETHICS_TASKS]
    mean = {
        key: float(np.mean([subset[key] for subset in subsets]))
        for key in ("acc_a", "acc_b", "difference")
    }
    interval = percentile_interval(np.mean([draws[task] for task in ETHICS_TASKS], axis=0))
    return mean | {"interval": interval}
