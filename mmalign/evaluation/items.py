"""results.json and items.jsonl: what an evaluation writes, and how it is read back."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.evaluation.tasks import ENTRIES, TASKS, score_rows, summarize
from mmalign.evaluation.tasks.task import is_number
from mmalign.files import read_json, read_json_lines, replacing, sha256, write_text

log = logging.getLogger("mmalign")
Items = dict[str, list[dict]]  # lines of items.jsonl by task

# How every text reaches the model. Two evaluations that differ here cannot be compared.
PROTOCOL = {"template": "none: plain text, no conversation template", "bos": "none"}
_CONFIG_KEYS = {*PROTOCOL, "tasks", "versions", "data_files", "model", "limit", "precision"}
_CONFIG_KEYS |= {"tokenizer", "tokenizer_sha256", "max_length", "num_requests"}


def require_no_loss(output: Path, weights: Path, tasks: Collection[str], limit: int | None) -> None:
    """UserError where `output` holds results that an evaluation of this kind would not replace.

    Those are of other weights, of other tasks or of more documents; or they are damaged.
    """
    if not (output / "results.json").exists():
        return
    remedy = "Name another --output, or replace them with --overwrite"
    try:
        before = read_results(output)["config"]
    except UserError as error:
        raise UserError(
            f"{error}, name another --output, or replace it with --overwrite"
        ) from error
    if before["weights"] != str(weights.resolve()):
        raise UserError(
            f"{output} holds the results of {before['weights']}, not of {weights}. {remedy}"
        )
    if others := sorted(before["tasks"].keys() - set(tasks)):
        raise UserError(
            f"{output} holds the results of {', '.join(others)}, which --tasks leaves out. {remedy}"
        )
    if limit is not None and (before["limit"] is None or before["limit"] > limit):
        held = "all" if before["limit"] is None else f"the first {before['limit']}"
        raise UserError(
            f"{output} holds the results of {held} documents of each task, more than --limit "
            f"{limit}. {remedy}"
        )


# what an evaluation writes, and its report
FILES = ("results.json", "items.jsonl", "answers.jsonl", "*.md", "*.png", "*.csv")


def make_folder(output: str | Path) -> Path:
    """Creates `output` where it does not exist; UserError where that is impossible."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be a directory: {error.strerror}. Name another folder"
        ) from error
    return Path(output)


def write_items(output: Path, items: Mapping[str, Sequence[dict]], results: dict) -> None:
    """Both files are whole before one of them takes the place of an earlier one.

    results.json comes last, so its presence marks a finished evaluation. Its config holds the
    checksums of both.
    """
    output.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for rows in items.values() for item in rows)
    results["config"]["items_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    results["config"]["results_sha256"] = _digest(results)
    with replacing(output / "results.json") as results_file:
        results_file.write(json.dumps(results, indent=2) + "\n")
        results_file.flush()
        os.fsync(results_file.fileno())  # a full disk shows before items.jsonl is replaced
        write_text(output / "items.jsonl", lines)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds an evaluation that can be read; warns of a damaged one."""
    if not (folder / "results.json").exists():
        return False
    try:
        read_results(folder)
        read_items(folder)
    except UserError as error:
        log.warning("%s; this evaluation does not count", error)
        return False
    return True


def read_results(folder: str | Path) -> dict:
    """results.json of an evaluation's output; UserError for one that cannot be what we wrote."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished evaluation: results.json is missing. Evaluate the model "
            "with scripts/evaluate.py"
        )
    results = read_json(path)
    config = results.get("config", {})
    if not isinstance(config, dict) or (missing := _CONFIG_KEYS - config.keys()):
        lacks = ", ".join(sorted(missing)) if isinstance(config, dict) else "an object"
        raise UserError(
            f"{path} lacks {lacks} in its config: another program or an older version wrote it. "
            "Evaluate the model again"
        )
    if not all(isinstance(config[key], dict) for key in ("tasks", "versions", "data_files")):
        raise UserError(
            f"{path}: tasks, versions or data_files is damaged. Evaluate the model again"
        )
    if not (config["limit"] is None or type(config["limit"]) is int):
        raise UserError(
            f"{path}: limit is {config['limit']!r}; expected null or a number of documents. "
            "Evaluate the model again"
        )
    try:
        for name, row in (score_rows(results) | _beside(results)).items():
            numbers = (row["acc"], *row["interval"])
            if len(numbers) != 3 or not all(
                is_number(x, -1, row.get("largest", 1)) for x in numbers
            ):
                raise UserError(
                    f"{path}: {name} has the scores {numbers}; expected three numbers from -1 to "
                    f"{row.get('largest', 1):g}. Evaluate the model again"
                )
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: a score is damaged ({error}). Evaluate the model again"
        ) from error
    return results


def _beside(results: dict) -> dict[str, dict]:
    return {
        f"{task} ({kind})": row
        for task in ENTRIES
        for kind, row in results.get(task, {}).get("beside", {}).items()
    }


def read_items(folder: str | Path) -> Items:
    """items.jsonl of an evaluation's output, by task.

    UserError with line and document for what cannot be, for a content that results.json does not
    know, and for a results.json that has changed or whose scores do not follow from it.
    """
    path = Path(folder) / "items.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; evaluate the model again")
    items: Items = {}
    for number, item in enumerate(read_json_lines(path, {"task", "doc_id"}), start=1):
        where = f"{path}, line {number}"
        task = TASKS.get(item["task"]) if isinstance(item["task"], str) else None
        if task is None or (missing := task.item_keys - item.keys()):
            found = f"unknown task {item['task']!r}" if task is None else f"no {', '.join(missing)}"
            raise UserError(f"{where}: {found}. Evaluate the model again")
        if problem := task.problem(item):
            name = f"{task.name} document {item['doc_id']!r}"
            raise UserError(f"{where}, {name}: {problem}. Evaluate the model again")
        items.setdefault(task.name, []).append(item)
    results = read_results(folder)
    if not items or sha256(path) != results["config"].get("items_sha256"):
        raise UserError(
            f"{path} is not the one that was written with results.json: it was cut short or "
            "changed. Evaluate the model again"
        )
    path = path.with_name("results.json")
    _require_scores_of(items, results, path)
    if results["config"].get("results_sha256") != _digest(results):
        raise UserError(f"{path} has changed since it was written. Evaluate the model again")
    return items


def _digest(results: dict) -> str:
    """Of all but the checksum itself."""
    config = {k: v for k, v in results["config"].items() if k != "results_sha256"}
    content = json.dumps(results | {"config": config}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _require_scores_of(items: Items, results: dict, path: Path) -> None:
    """UserError with the names of scores in results.json that do not follow from the items."""
    expected = summarize(items)
    known = expected.keys() | (results.keys() & ENTRIES.keys())
    wrong = [x for x in ENTRIES if x in known and not _agree(results.get(x), expected.get(x))]
    if wrong:
        raise UserError(
            f"{path}: the scores of {', '.join(wrong)} do not follow from items.jsonl beside it. "
            "Evaluate the model again"
        )


def _agree(found: Any, expected: Any) -> bool:
    """Whether all numbers are equal; what is said about them may come from another version."""
    if isinstance(expected, dict):
        keys = expected.keys() - {"caveats"}
        return isinstance(found, dict) and all(_agree(found.get(x), expected[x]) for x in keys)
    if isinstance(expected, list | tuple):
        same_length = isinstance(found, list) and len(found) == len(expected)
        return same_length and all(map(_agree, found, expected))
    if is_number(expected, -math.inf, math.inf):
        return is_number(found, expected - 1e-9, expected + 1e-9)
    return found == expected or isinstance(expected, str)
