"""All tasks by name, and what they are called on the command line.

A new task is a file beside this one with its TASKS, plus its name in _FILES; evaluation,
comparison, report and help text take it from here. task.py says what a task has to provide, and
each kind has a base: multiple_choice.py (truthfulqa.py, ethics.py), free_form.py
(truthfulqa_gen.py) and vision_task.py (the others).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmalign.errors import UserError
from mmalign.evaluation.tasks import (
    captions,
    ethics,
    mme,
    pope,
    truthfulqa,
    truthfulqa_gen,
    vqav2,
)
from mmalign.evaluation.tasks.task import Mean, Task

# in the order of tables
_FILES = (truthfulqa, ethics, truthfulqa_gen, vqav2, captions, pope, mme)

ENTRIES: dict[str, Task | Mean] = {x.name: x for file in _FILES for x in file.TASKS}
TASKS = {name: x for name, x in ENTRIES.items() if isinstance(x, Task)}
MEANS = {name: x for name, x in ENTRIES.items() if isinstance(x, Mean)}

Documents = Mapping[str, list[Any]]  # by task: Document, or OpenDocument where it generates


def _tasks_by_choice() -> dict[str, list[str]]:
    """Groups, single tasks and aliases: what --tasks takes."""
    groups: dict[str, list[str]] = {}
    aliases: dict[str, list[str]] = {}
    for name, task in TASKS.items():
        if task.group:
            groups.setdefault(task.group, []).append(name)
        for alias in task.aliases:
            aliases.setdefault(alias, []).append(name)
    return groups | {name: [name] for name in TASKS} | aliases


_CHOICES = _tasks_by_choice()
if TYPE_CHECKING:
    TaskName = str
else:  # what --tasks takes: tyro lists the choices and refuses others
    TaskName = Literal[tuple(_CHOICES)]


def resolve_tasks(names: Iterable[str]) -> list[str]:
    """Names of tasks, in the order of tables, for groups, tasks and the harness's names."""
    names = list(names)
    if unknown := [name for name in names if name not in _CHOICES]:
        raise UserError(f"unknown task {unknown[0]!r}; expected one of {', '.join(_CHOICES)}")
    if not names:
        raise UserError(f"no task given; name at least one of {', '.join(_CHOICES)}")
    wanted = {task for name in names for task in _CHOICES[name]}
    return [task for task in TASKS if task in wanted]


def load_documents(
    tasks: Sequence[str], data_root: str | Path, limit: int | None = None
) -> dict[str, list]:
    """The documents of each task in file order; limit keeps the first ones of each."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"--data-root {root} is not a directory; name the folder of the data files")
    return {task: TASKS[task].load(root, limit) for task in tasks}


def describe_data(tasks: Iterable[str], data_root: str | Path) -> dict[str, dict[str, str]]:
    """{path under data_root: {"sha256", optionally "variant"}} of the files that were scored."""
    files = {}
    for task in tasks:
        files |= TASKS[task].data_files(Path(data_root))
    return files


def summarize(items: Mapping[str, list[dict]]) -> dict[str, dict]:
    """The objects of results.json: of each task, and of each mean whose tasks are all there."""
    results = {task: TASKS[task].summarize(rows) for task, rows in items.items()}
    for name, mean in MEANS.items():
        if all(task in results for task in mean.members):
            results[name] = mean.summarize(results)
    for name, summary in results.items():
        summary["caveats"] = ENTRIES[name].caveats(summary)
    return {name: results[name] for name in ENTRIES if name in results}


def picture_tasks(names: Iterable[str]) -> list[str]:
    """Those of resolve_tasks(names) that are about pictures."""
    return [name for name in resolve_tasks(names) if TASKS[name].kind == "vision"]


def score_rows(results: Mapping[str, dict]) -> dict[str, dict]:
    """Rows of tables and figures, from what results.json holds; a task can have several."""
    rows = {}
    for name, entry in ENTRIES.items():
        if name in results:
            rows |= entry.rows(results[name])
    return rows
