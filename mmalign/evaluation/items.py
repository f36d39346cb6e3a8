"""results.json and items.jsonl: what an evaluation writes, and how it is read back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.tasks import TASKS
from mmalign.files import read_json, read_json_lines, write_json, write_json_lines

Items = dict[str, list[dict]]  # lines of items.jsonl by task

# How every text reaches the model. Two evaluations that differ here cannot be compared.
PROTOCOL = {"template": "none: plain text, no conversation template", "bos": "none"}


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
    """results.json appears last and whole, so its presence marks a finished evaluation."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").unlink(missing_ok=True)
    write_json_lines(output / "items.jsonl", (item for rows in items.values() for item in rows))
    write_json(output / "results.json", results)


def read_results(folder: str | Path) -> dict:
    """results.json of an evaluation's output."""
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished evaluation: results.json is missing. Evaluate the model "
            "with scripts/evaluate.py"
        )
    results = read_json(path)
    if missing := {*PROTOCOL, "tasks", "versions"} - results.get("config", {}).keys():
        raise UserError(
            f"{path} lacks {', '.join(sorted(missing))} in its config: another program or an older "
            "version wrote it. Evaluate the model again"
        )
    return results


def read_items(folder: str | Path) -> Items:
    """items.jsonl of an evaluation's output, by task."""
    path = Path(folder) / "items.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; evaluate the model again")
    items: Items = {}
    for number, item in enumerate(read_json_lines(path, {"task", "doc_id"}), start=1):
        task = TASKS.get(item["task"])
        if task is None or (missing := task.item_keys - item.keys()):
            found = f"unknown task {item['task']!r}" if task is None else f"no {', '.join(missing)}"
            raise UserError(f"{path}, line {number}: {found}. Evaluate the model again")
        items.setdefault(task.name, []).append(item)
    return items
