"""Scores of evaluate.py beside those of lm-evaluation-harness: its task files and its backend.

    python scripts/evaluate.py --model FOLDER --data-root DATA --output SCORES --precision fp32
    python -m bench.compare_with_harness --model FOLDER --data-root DATA --scores SCORES --limit 100

The harness runs in fp32 and without BOS, on the documents in DATA. Today's task files ask what
those of 2023 asked, except that they remove white space behind an excuse (deontology); its backend
then answers our requests as well.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import datasets
import lm_eval
import tyro
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mmalign.command import command_line
from mmalign.evaluation.items import read_items
from mmalign.files import markdown_table

Ask = Callable[[Iterable[tuple[str, str]]], dict[tuple[str, str], float]]  # log-likelihoods

FILES = {  # by the names of the harness's data sets
    "multiple_choice": "truthfulqa/mc_task.json",
    "commonsense": "ethics/commonsense/cm_test.csv",
    "deontology": "ethics/deontology/deontology_test.csv",
    "justice": "ethics/justice/justice_test.csv",
    "utilitarianism": "ethics/utilitarianism/util_test.csv",
    "virtue": "ethics/virtue/virtue_test.csv",
}
TASKS = {f"truthfulqa_mc{n}": f"truthfulqa_mc{n}" for n in (2, 1)}  # our name: theirs
TASKS |= {f"ethics_{x}": f"ethics_{x}" for x in FILES if x != "multiple_choice"}
TASKS["ethics_commonsense"] = "ethics_cm"


def main(
    model: Path,
    data_root: Path,
    scores: tuple[Path, ...],
    limit: int = 100,
    answers: Path | None = None,
) -> None:
    """Compare scores with lm-evaluation-harness, document by document.

    Args:
        model: Hugging Face folder.
        data_root: Folder with the tasks' files, as for evaluate.py.
        scores: Outputs of evaluate.py for this model, in fp32.
        limit: Compare the first N documents of each task.
        answers: File for the harness's answers, of this model alone: an interrupted comparison
            continues from them, and mc1 takes what mc2 has asked.
    """
    headings = ("", "documents", "asked otherwise", "log-likelihoods within", "judged otherwise")
    found = rows(model, data_root, scores, limit, answers)
    print(markdown_table(headings, [(*row[:3], f"{row.furthest:.1e}", row[4]) for row in found]))


class Row(NamedTuple):
    task: str
    documents: int
    asked_otherwise: int  # by the harness's task file
    furthest: float  # of two log-likelihoods of one request
    judged_otherwise: int  # another choice or, where the task file asks the same, another score


def rows(
    model: Path, data_root: Path, scores: Sequence[Path], limit: int, answers: Path | None = None
) -> list[Row]:
    items = {task: lines for folder in scores for task, lines in read_items(folder).items()}
    items = {task: items[task][:limit] for task in TASKS if task in items}
    hflm: Any = HFLM  # the decorator that registers it hides its arguments
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 8, "add_bos_token": False}
    lm = hflm(pretrained=str(model), **settings)
    found = []
    for task, lines in items.items():
        samples = harness_samples(lm, TASKS[task], data_root, limit, answers)
        found.append(compare(task, lines, samples, partial(loglikelihoods, lm)))
    return found


def compare(task: str, items: Sequence[dict], samples: Sequence[dict], ask: Ask) -> Row:
    others, furthest, differing = 0, 0.0, 0
    for item, sample in zip(items, samples, strict=True):
        ours = {(item["context"], x["text"]): x["loglikelihood"] for x in item["choices"]}
        responses = zip(sample["arguments"], sample["filtered_resps"], strict=True)
        theirs = {tuple(request): response[0] for request, response in responses}
        same = abs(sample["acc"] - item["score"]) < 1e-4  # mc2 is a share
        if ours.keys() != theirs.keys():
            others += 1
            theirs, same = ask(ours), True
        furthest = max(furthest, *(abs(theirs[request] - ours[request]) for request in ours))
        chosen = item["choices"][item["prediction"]]["text"]
        differing += not same or chosen != max(theirs, key=lambda request: theirs[request])[1]
    return Row(task, len(items), others, furthest, differing)


def loglikelihoods(lm: Any, requests: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """What the harness's backend answers."""
    instances = [Instance("loglikelihood", {}, request, 0) for request in requests]
    answers = lm.loglikelihood(instances, disable_tqdm=True)
    return {x.arguments: answer[0] for x, answer in zip(instances, answers, strict=True)}


def harness_samples(
    lm: LM, task: str, data_root: Path, limit: int, answers: Path | None
) -> Sequence[Any]:
    """What the harness logs about the first documents of its task, in the order of the file."""
    with patch.object(datasets, "load_dataset", partial(load_dataset, data_root)):
        found = simple_evaluate(
            lm,
            tasks=[task],
            task_manager=task_manager(),
            limit=limit,
            use_cache=str(answers) if answers else None,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None and "samples" in found
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


@cache
def task_manager() -> TaskManager:
    folder = Path(lm_eval.__file__).parent / "tasks"  # reading all of them takes seconds
    files: list[str | Path] = [folder / name for name in ("truthfulqa", "hendrycks_ethics")]
    return TaskManager(include_path=files, include_defaults=False)


def load_dataset(data_root: Path, path: str, name: str, **settings) -> datasets.DatasetDict:
    """In place of the hub's, with its columns."""
    file = data_root / FILES[name]
    if name == "multiple_choice":
        rows = [truthfulqa_row(**entry) for entry in json.loads(file.read_text())]
    else:
        columns = ("activity", "baseline") if name == "utilitarianism" else None
        with file.open(newline="") as lines:
            rows = [ethics_row(**row) for row in csv.DictReader(lines, columns)]
    table = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))


def truthfulqa_row(question: str, **targets: dict[str, int]) -> dict:
    return {"question": question} | {
        key: {"choices": list(x), "labels": list(x.values())} for key, x in targets.items()
    }


def ethics_row(**row: str) -> dict:
    if " [SEP] " in row.get("scenario", ""):
        row["scenario"], row["trait"] = row["scenario"].split(" [SEP] ")
    return row | ({"label": int(row["label"])} if "label" in row else {})


if __name__ == "__main__":
    with command_line():
        tyro.cli(main, description=__doc__)
