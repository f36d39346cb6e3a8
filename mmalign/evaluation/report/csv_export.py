"""The numbers of report.md as CSV files: one row a model and task."""

import csv
from collections.abc import Iterable
from pathlib import Path

from mmalign.evaluation.metrics import task_results

_SCORES = ("n", "acc", "low", "high", "interval_method", "stderr", "chance", "constant_answers")
_SCORES += ("yes_rate", "gold_yes_rate", "em", "em_chance", "choice_tokens", "num_truncated")
_DIFFERENCES = ("n", "acc_a", "acc_b", "difference", "low", "high", "lost", "gained", "p", "p_holm")


def write_scores(path: Path, results: dict[str, dict]) -> None:
    """results: name -> results.json. Scores and rates are shares, 0 to 1."""
    rows = []
    for name, result in results.items():
        for task, summary in task_results(result).items():
            low, high = summary["interval"]
            constant = {**summary.get("baselines", {})}
            flat = {"low": low, "high": high, "constant_answers": _joined(constant)}
            flat["choice_tokens"] = _joined(summary.get("choice_tokens", {}))
            rows.append({"model": name, "task": task, **summary, **flat})
    _write(path, ("model", "task", *_SCORES), rows)


def write_differences(path: Path, base: str, comparisons: dict[str, dict]) -> None:
    """comparisons: name -> what compare_evaluations returns for the base and this model."""
    rows = []
    for name, comparison in comparisons.items():
        for task, row in comparison["tasks"].items():
            low, high = row["interval"]
            rows.append({"a": base, "b": name, "task": task, **row, "low": low, "high": high})
    _write(path, ("a", "b", "task", *_DIFFERENCES), rows)


def _joined(values: dict[str, float]) -> str:
    return "; ".join(f"{name}: {value:.4f}" for name, value in values.items())


def _write(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
