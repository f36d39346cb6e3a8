"""The seven tasks, their names on the command line, and their documents."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.errors import UserError
from mmalign.evaluation.documents import Document, file_sha256
from mmalign.evaluation.tasks import ethics, truthfulqa

PROMPT_VERSION = "lm-evaluation-harness 00209e10f (September 2023), zero-shot"


@dataclass(frozen=True)
class Task:
    name: str
    answers: tuple[str, ...] = ()  # the two continuations of every document; (): they differ
    answer_of_label_1: int = 0  # index in answers: " yes" or " reasonable"
    group_size: int | None = None  # documents that grouped exact match takes together

    @property
    def answer_of_label_0(self) -> int:
        return 1 - self.answer_of_label_1

    @property
    def right_or_wrong(self) -> bool:
        """Whether a document's score is 1 or 0; that of mc2 is a share."""
        return self.name != "truthfulqa_mc2"

    def answer_name(self, index: int) -> str:
        return self.answers[index].strip()


ETHICS_TASKS = tuple(f"ethics_{name}" for name in ethics.SUBSETS)
GENERATION_TASK = "truthfulqa_gen"  # written answers: no Task, see written_answers.py
TRUTHFULQA_TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")
TASKS = {name: Task(name) for name in TRUTHFULQA_TASKS} | {
    f"ethics_{name}": Task(
        f"ethics_{name}", subset.answers, subset.answer_of_label_1, subset.group_size
    )
    for name, subset in ethics.SUBSETS.items()
}
_GROUPS = {"truthfulqa": TRUTHFULQA_TASKS, "ethics": ETHICS_TASKS}
_HARNESS_NAMES = {"truthfulqa_mc": TRUTHFULQA_TASKS, "ethics_cm": ("ethics_commonsense",)}


def resolve_tasks(names: Sequence[str]) -> list[str]:
    """Task names for groups (truthfulqa, ethics), single tasks and the harness's names."""
    known = _GROUPS | {name: (name,) for name in TASKS} | _HARNESS_NAMES
    if GENERATION_TASK in names:
        raise UserError(
            f"{GENERATION_TASK} is not among the tasks that are scored by log-likelihoods; "
            "scripts/evaluate.py --tasks takes it"
        )
    for name in names:
        if name not in known:
            listed = [*known, GENERATION_TASK]
            close = difflib.get_close_matches(name, listed, n=1)
            hint = f"Perhaps you meant {close[0]}. " if close else ""
            raise UserError(f"unknown task {name!r}. {hint}Known: {', '.join(listed)}")
    wanted = {task for name in names for task in known[name]}
    if not wanted:
        raise UserError(f"no task given. Known: {', '.join(known)}")
    return [task for task in TASKS if task in wanted]


def load_documents(
    tasks: Sequence[str], data_root: str | Path, limit: int | None = None
) -> dict[str, list[Document]]:
    """The documents of each task in file order; limit keeps the first ones of each."""
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 document")
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"--data-root {root} is not a folder")
    documents: dict[str, list[Document]] = {task: [] for task in tasks}
    if any(task in TRUTHFULQA_TASKS for task in tasks):
        for document in truthfulqa.load_truthfulqa(root):
            if document.task in documents:
                documents[document.task].append(document)
    subsets = tuple(name for name in ethics.SUBSETS if f"ethics_{name}" in documents)
    if subsets:
        for subset, rows in ethics.load_ethics(root, subsets).items():
            documents[f"ethics_{subset}"] = rows
    return {task: rows[:limit] for task, rows in documents.items()}


def describe_data(tasks: Sequence[str], data_root: str | Path) -> dict[str, dict[str, str]]:
    """Which files were scored: {path under data_root: {"sha256", and "variant" of TruthfulQA}}."""
    root = Path(data_root)
    files = {}
    if any(task in TRUTHFULQA_TASKS for task in tasks):
        digest = file_sha256(root / truthfulqa.FILE)
        variant = truthfulqa.VARIANTS.get(digest, "neither the original nor the revised file")
        files[truthfulqa.FILE] = {"sha256": digest, "variant": variant}
    for subset in ethics.SUBSETS:
        if f"ethics_{subset}" in tasks:
            path = ethics.ethics_file(root, subset)
            files[str(path.relative_to(root))] = {"sha256": file_sha256(path)}
    return files
