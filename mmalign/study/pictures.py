"""Tasks about pictures in a study: asking, and the scores of every document.

FOLDER/pictures/PROTOCOL/                        the run's answers with the pictures as they are
FOLDER/pictures/PROTOCOL/blind, TYPE-SEVERITY    the same with pictures shown otherwise

Metrics are named after the task (pope, pope_auroc), after it and what was shown (pope_blind,
pope_gaussian_noise-3), and after what the own picture adds to that: pope_over_blind, and
pope_over_corrupted, the mean over all corruptions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmalign.data.workers import NumWorkers
from mmalign.evaluation.corruptions import parse_corruptions
from mmalign.evaluation.document_scores import DocumentScores, document_scores
from mmalign.evaluation.items import read_items
from mmalign.evaluation.pictures import Control
from mmalign.evaluation.tasks import TASKS, picture_tasks
from mmalign.evaluation.tasks.vision_task import PROTOCOLS, Protocol, VisionTask
from mmalign.evaluation.vision import evaluate_pictures
from mmalign.study.contrasts import RunKey
from mmalign.study.identity import Evaluation, Order

RunScores = dict[str, DocumentScores]  # by metric
BESIDE = ("auroc", "yes_rate")  # of tasks with yes/no questions
OVER_CORRUPTED = "over_corrupted"


def _by_protocol(tasks: Iterable[str]) -> dict[Protocol, list[str]]:
    found: dict[Protocol, list[str]] = {x: [] for x in PROTOCOLS}
    for name in picture_tasks(tasks):
        task = TASKS[name]
        assert isinstance(task, VisionTask)
        found[task.protocol_name].append(name)
    return {protocol: names for protocol, names in found.items() if names}


def metric_names(
    tasks: Iterable[str], controls: Sequence[Control], corruptions: Sequence[str]
) -> set[str]:
    """Of the metrics that a run which sees pictures has."""
    shown = [*controls, *_corrupted(corruptions)]
    added = [*(f"over_{x}" for x in controls), *([OVER_CORRUPTED] if corruptions else ())]
    names = picture_tasks(tasks)
    own = {f"{name}{kind}" for name in names for kind in ("", *(f"_{x}" for x in BESIDE))}
    return (
        own | {f"{x}_{y}" for x in own for y in shown} | {f"{x}_{y}" for x in names for y in added}
    )


def _corrupted(corruptions: Sequence[str]) -> list[str]:
    """Names of the folders."""
    return [f"{name}-{severity}" for name, severity in parse_corruptions(corruptions)]


def ask_about_pictures(
    model: Path, asked: Evaluation, output: Path, num_workers: NumWorkers
) -> None:
    """An interrupted call continues."""
    for protocol, names in _by_protocol(asked.tasks).items():
        evaluate_pictures(
            *(model, names, asked.data_root, output / protocol, asked.limit, protocol),
            corruptions=asked.corruptions,
            controls=asked.controls,
            num_workers=num_workers,
            quiet=True,
            overwrite=True,
        )


# ---- scores ----


def picture_scores(order: Order) -> RunScores:
    """Of every document; none where the model sees no pictures."""
    asked, found = order.evaluation, {}
    if asked is None or not order.pictures.is_dir():
        return found
    for protocol in _by_protocol(asked.tasks):
        folder = order.pictures / protocol
        own = document_scores(read_items(folder))
        names = [*asked.controls, *_corrupted(asked.corruptions)]
        shown = {name: document_scores(read_items(folder / name)) for name in names}
        found |= own
        found |= {f"{x}_{name}": y for name, scores in shown.items() for x, y in scores.items()}
        for task in (x for x in own if x in TASKS):
            for name in asked.controls:
                found[f"{task}_over_{name}"] = _added(own[task], [shown[name][task]])
            corrupted = [shown[name][task] for name in names[len(asked.controls) :]]
            if corrupted:
                found[f"{task}_{OVER_CORRUPTED}"] = _added(own[task], corrupted)
    return {metric: replace(x, metric=metric) for metric, x in found.items()}


def _added(own: DocumentScores, others: Sequence[DocumentScores]) -> DocumentScores:
    return replace(own, values=own.values - np.mean([x.values for x in others], axis=0))


def add_zeros(scores: Mapping[RunKey, RunScores]) -> None:
    """A model that sees no pictures gains nothing by them: metrics "over" are 0."""
    over = {
        name: x for run in scores.values() for name, x in run.items() if f"{x.task}_over_" in name
    }
    for run in scores.values():
        for name, x in over.items():
            run.setdefault(name, replace(x, values=np.zeros(len(x.values))))
