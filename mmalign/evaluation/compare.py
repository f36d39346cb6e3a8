"""Paired comparison of two evaluations: the same documents, two models."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.beside import compare_beside, gain_and_style
from mmalign.evaluation.items import PROTOCOL, Items, read_items, read_results
from mmalign.evaluation.metrics import exact_match
from mmalign.evaluation.statistics import NUM_RESAMPLES, compare_scores, holm, percentile_interval
from mmalign.evaluation.tasks import ENTRIES, TASKS
from mmalign.evaluation.tasks.task import Mean, Task

METHOD = (
    f"paired percentile bootstrap, {NUM_RESAMPLES:,} resamples of documents (of whole groups where "
    "several documents share a scenario); p: exact McNemar test, Holm-corrected over all tests, "
    "which assumes independent documents (trust the interval for tasks with groups)"
)


def compare_evaluations(dir_a: str | Path, dir_b: str | Path) -> dict:
    """Differences between evaluation outputs A and B, for every task that both contain.

    Returns {"a": folder, "b": folder, "method": text, "only_in_one": tasks that one lacks,
    "settings": those that differ, [A's, B's] each, "tasks": {row: {"acc_a", "acc_b", "difference",
    "interval" (95%), "n", and where a document is right or wrong "lost", "gained" (documents),
    "p", "p_holm"}}, "beside": what compare_beside returns, with the metrics that one of the two
    lacks, mostly because it is older, in "beside_only_in_one", "gain_and_style": that of
    TruthfulQA-mc2, "flipped": documents, with their text}. A task has one row per metric.
    Differences are B - A. Raises UserError where a folder is not an evaluation, or the two differ
    in documents, prompts or scoring.
    """
    configs = [read_results(folder)["config"] for folder in (dir_a, dir_b)]
    _require_equal(f"{dir_a} and {dir_b}", *({key: x[key] for key in PROTOCOL} for x in configs))
    items_a, items_b = read_items(dir_a), read_items(dir_b)
    shared = [task for task in TASKS if task in items_a and task in items_b]
    if not shared:
        raise UserError(
            f"{dir_a} and {dir_b} have no task in common; evaluate both models on the same --tasks"
        )
    for task in shared:
        names = f"{task}: {dir_a} and {dir_b}"
        _require_equal(names, *(config["tasks"].get(task, {}) for config in configs))
        _require_same_documents(task, items_a[task], items_b[task])
    beside, missing = compare_beside(*({x: y[x] for x in shared} for y in (items_a, items_b)))
    return {
        "a": str(dir_a),
        "b": str(dir_b),
        "method": METHOD,
        "only_in_one": sorted(set(items_a) ^ set(items_b)),
        "settings": _differing_settings(*configs),
        "tasks": _rows(shared, items_a, items_b),
        "beside": beside,
        "beside_only_in_one": missing,
        "gain_and_style": _gain_and_style(items_a, items_b),
        "flipped": [
            document
            for task in shared
            for document in _flipped(TASKS[task], items_a[task], items_b[task])
        ],
    }


def _require_equal(names: str, a: dict, b: dict) -> None:
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            raise UserError(
                f"{names} cannot be compared: {key} is {a.get(key)!r} and {b.get(key)!r}; evaluate "
                "both models with one version of this program and of its libraries"
            )


def _require_same_documents(task: str, items_a: Sequence[dict], items_b: Sequence[dict]) -> None:
    if len(items_a) != len(items_b):
        raise UserError(
            f"{task}: {len(items_a)} documents against {len(items_b)}; evaluate both models with "
            "the same files and the same --limit"
        )
    for a, b in zip(items_a, items_b, strict=True):
        if any(a.get(key) != b.get(key) for key in ("doc_id", "sha256", "gold")):
            raise UserError(
                f"{task} document {a['doc_id']}: the two evaluations did not score the same text "
                f"(sha256 {a['sha256']} against {b['sha256']}); evaluate both on the same files"
            )


def _differing_settings(a: dict, b: dict) -> dict[str, list]:
    """Precision, tokenizer and whatever else may differ between two models, from their configs."""
    keys = ("precision", "tokenizer_sha256", "max_length")
    differing = {key: [a[key], b[key]] for key in keys if a[key] != b[key]}
    for package in sorted(a["versions"].keys() | b["versions"].keys()):
        found = [config["versions"].get(package) for config in (a, b)]
        if found[0] != found[1]:
            differing[package] = found
    return differing


def _rows(shared: Sequence[str], items_a: Items, items_b: Items) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    draws: dict[str, np.ndarray] = {}
    seeds = Counter()  # by kind: a task added to one kind leaves the other's intervals alone
    for name, entry in ENTRIES.items():
        if isinstance(entry, Task) and name in shared:
            seed, seeds[entry.kind] = seeds[entry.kind], seeds[entry.kind] + 1
            rows |= _compare_task(entry, items_a[name], items_b[name], seed, draws)
        elif isinstance(entry, Mean) and all(task in shared for task in entry.members):
            rows[name] = _compare_mean(entry, rows, draws)
    tested = [row for row in rows.values() if "p" in row]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return rows


def _gain_and_style(items_a: Items, items_b: Items) -> dict[str, dict]:
    name = "truthfulqa_mc2"
    return (
        gain_and_style(items_a[name], items_b[name]) if name in items_a and name in items_b else {}
    )


def _compare_task(
    task: Task,
    items_a: Sequence[dict],
    items_b: Sequence[dict],
    seed: int,
    draws: dict[str, np.ndarray],
) -> dict[str, dict]:
    """A row for each metric; its resampled differences go into `draws`."""
    groups, rows = [item.get("group_id", i) for i, item in enumerate(items_a)], {}
    for metric in task.metrics:
        a, b = ([metric.value(item) for item in items] for items in (items_a, items_b))
        row, draws[metric.row] = compare_scores(a, b, groups, seed, metric.right_or_wrong)
        if task.group_size:
            row["em_a"] = exact_match(items_a, a, task.group_size)
            row["em_b"] = exact_match(items_b, b, task.group_size)
        rows[metric.row] = row
    return rows


def _compare_mean(mean: Mean, rows: dict[str, dict], draws: dict[str, np.ndarray]) -> dict:
    """The members are independent samples, so their resamples combine as they are."""
    members = [rows[task] for task in mean.members]
    keys = ("acc_a", "acc_b", "difference")
    row = {key: float(np.mean([member[key] for member in members])) for key in keys}
    combined = np.mean([draws[task] for task in mean.members], axis=0)
    return row | {"interval": percentile_interval(combined)}


def _flipped(task: Task, items_a: Sequence[dict], items_b: Sequence[dict]) -> list[dict]:
    """Documents whose choice became wrong ("lost") or right ("gained"), with their text."""
    if task.kind != "loglikelihood" or not all(metric.right_or_wrong for metric in task.metrics):
        return []
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
        for a, b in zip(items_a, items_b, strict=True)
        if a["score"] != b["score"]
    ]
