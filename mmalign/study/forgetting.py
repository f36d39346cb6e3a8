"""Tasks of lm-evaluation-harness that a tuned model may forget, right or wrong by document."""

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.errors import UserError
from mmalign.files import write_json

_METRICS = ("acc", "exact_match", "exact", "em", "f1")  # the first that a task has
_MISSING = 'forgetting needs lm-evaluation-harness: pip install ".[harness]", or leave it out'
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def parse_task(name: str) -> tuple[str, int]:
    """ "gsm8k:8" -> ("gsm8k", 8)."""
    task, _, shots = name.partition(":")
    if not task or not (shots or "0").isdecimal():
        raise UserError(f"forgetting: {name!r}; expected TASK or TASK:SHOTS, such as gsm8k:8")
    return task, int(shots or 0)


def require_tasks(names: Sequence[str]) -> None:
    """UserError where lm-evaluation-harness is missing, or does not know one of the tasks."""
    if not names:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(_MISSING) from error
    known = {*TaskManager().all_tasks}
    if unknown := [name for name in names if parse_task(name)[0] not in known]:
        raise UserError(
            f"forgetting: lm-evaluation-harness has no task {unknown[0]!r}. lm-eval ls tasks lists "
            "them"
        )


def path_of(folder: Path, name: str) -> Path:
    task, shots = parse_task(name)
    return folder / f"{task}-{shots}.json"


def score_forgetting(model: Path, names: Sequence[str], folder: Path) -> None:
    """Writes path_of(folder, name) for each: {metric: {"doc_ids", "values"}}, from 0 to 1.

    A task whose file exists is skipped, so a stopped run continues with the next.
    """
    left = [name for name in names if not path_of(folder, name).exists()]
    if not left:
        return
    try:
        from lm_eval.evaluator import simple_evaluate

        from mmalign.lm_eval import MmalignLM
    except ImportError as error:
        raise UserError(_MISSING) from error
    folder.mkdir(exist_ok=True)
    language_model = MmalignLM(pretrained=str(model))
    for name in left:
        task, shots = parse_task(name)
        found: Any = simple_evaluate(
            model=language_model, tasks=[task], num_fewshot=shots, bootstrap_iters=0
        )
        write_json(path_of(folder, name), by_document(task, found["samples"]))


def by_document(task: str, samples: Mapping[str, Sequence[dict]]) -> dict[str, dict]:
    """samples: of each subtask, whose documents are numbered through."""
    values, metric = [], ""
    for subtask in sorted(samples):
        rows = samples[subtask]
        rows = [row for row in rows if row.get("filter") == rows[0].get("filter")]  # the first one
        metric = next((x for x in _METRICS if rows and x in rows[0]), "")
        if not metric:
            raise UserError(
                f"forgetting: {task} has none of {', '.join(_METRICS)} by document. Leave it out"
            )
        values += [_value(row[metric]) for row in rows]
    return {f"{task}_{metric}": {"doc_ids": list(range(len(values))), "values": values}}


def _value(score: object) -> float:
    """SQuAD's are pairs of a prediction and a reference, which the harness scores together."""
    if isinstance(score, (list, tuple)):
        prediction, reference = score
        answers = reference["answers"]["text"] or [""]
        return float(_plain(prediction["prediction_text"]) in map(_plain, answers))
    return float(score)  # pyright: ignore[reportArgumentType]


def _plain(text: str) -> str:
    """As the official script of SQuAD compares answers."""
    kept = "".join(x for x in text.lower() if x not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())
