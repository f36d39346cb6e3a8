"""results.json and items.jsonl: what an evaluation leaves behind, and how it is read back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.caveats import remarks
from mmalign.evaluation.documents import Document
from mmalign.evaluation.metrics import ethics_mean, make_item, summarize
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.tasks import GENERATION_TASK, PROMPT_VERSION
from mmalign.system import versions
from mmalign.tokenizer import Tokenizer

Items = dict[str, list[dict]]  # lines of items.jsonl by task

# Two evaluations that differ in one of these did not ask the same.
PROTOCOL = {
    "prompts": PROMPT_VERSION,
    "template": "none: plain text, no conversation template",
    "bos": "none",
    "score": "sum of the log-probabilities of the choice's tokens, not divided by their number",
}

_ITEM_KEYS = {"task", "doc_id", "context", "choices", "prediction", "gold", "score", "sha256"}


def describe_model(tokenizer: Tokenizer, max_length: int, precision: str) -> dict:
    """Settings that may differ from model to model, for results.json's config."""
    return {
        "tokenizer": f"{tokenizer.path.name}, {tokenizer.vocab_size:,} tokens",
        "tokenizer_sha256": tokenizer.fingerprint,
        "max_length": max_length,
        "precision": precision,
        "versions": versions(),
    }


def make_items(documents: Mapping[str, Sequence[Document]], scores: Sequence[Score]) -> Items:
    """scores: one of every request of every document, in order."""
    remaining = iter(scores)
    return {
        task: [make_item(doc, [next(remaining) for _ in doc.requests]) for doc in rows]
        for task, rows in documents.items()
    }


def summarize_tasks(items: Items) -> dict[str, dict]:
    """The objects of results.json: of each task and, where all five are there, ETHICS's mean."""
    results = {task: summarize(rows) for task, rows in items.items()}
    if mean := ethics_mean(results):
        results["ethics_mean"] = mean
    for name, summary in results.items():
        summary["remarks"] = remarks(name, summary)
    return results


def make_folder(output: str | Path) -> Path:
    """`output` as a folder that is there; UserError where it cannot be."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be a folder: {error.strerror}") from error
    return Path(output)


def write_evaluation(output: Path, items: Items, results: dict) -> None:
    """results.json appears last and whole, so that it stands for a finished evaluation."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").unlink(missing_ok=True)
    lines = (json.dumps(item) + "\n" for rows in items.values() for item in rows)
    (output / "items.jsonl").write_text("".join(lines))
    torn = output / "results.tmp"
    torn.write_text(json.dumps(results, indent=2) + "\n")
    torn.rename(output / "results.json")


def read_results(folder: str | Path) -> dict:
    """results.json of an evaluation output."""
    path = Path(folder) / "results.json"
    try:
        results = _read_json(path)
    except OSError:
        raise UserError(
            f"{folder} is not a finished evaluation: it needs results.json and items.jsonl, as "
            "scripts/evaluate.py writes them"
        ) from None
    if missing := {*PROTOCOL, "versions"} - results.get("config", {}).keys():
        raise UserError(
            f"{path} does not say its {', '.join(sorted(missing))}: another program or an older "
            "version wrote it. Evaluate the model again"
        )
    return results


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_items(folder: str | Path) -> Items:
    """items.jsonl of an evaluation output, by task."""
    items: Items = {}
    for item in _read_lines(Path(folder) / "items.jsonl", _ITEM_KEYS):
        items.setdefault(item["task"], []).append(item)
    return items


def _read_lines(path: Path, keys: set[str]) -> list[dict]:
    """The objects of a JSON lines file, which all have these keys."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; evaluate the model again")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = keys - row.keys()
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not an item of an evaluation") from error
        if missing:
            raise UserError(f"{path}, line {number}: {', '.join(sorted(missing))} missing")
        rows.append(row)
    return rows


def read_written(folder: str | Path, results: dict) -> dict | None:
    """truthfulqa_gen.json of an evaluation output; None without it.

    results: results.json of the folder. Another command writes it, so written answers of other
    weights can lie beside it: None for these, too.
    """
    path = Path(folder) / f"{GENERATION_TASK}.json"
    written = _read_json(path) if path.is_file() else None
    same = written and written["config"]["weights"] == results["config"].get("weights")
    return written if same else None


def read_written_answers(folder: str | Path) -> list[dict]:
    """truthfulqa_gen.jsonl of an evaluation output: question, answer and scores of each."""
    return _read_lines(Path(folder) / f"{GENERATION_TASK}.jsonl", {"question", "answer", "scores"})
