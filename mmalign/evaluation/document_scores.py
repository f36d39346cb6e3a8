"""Every metric of an evaluation, document by document: what statistics are computed from."""

from dataclasses import dataclass

import numpy as np

from mmalign.errors import UserError
from mmalign.evaluation.items import Items
from mmalign.evaluation.tasks import MEANS as TASK_MEANS
from mmalign.evaluation.tasks import TASKS
from mmalign.evaluation.tasks.ethics_subset import BESIDE_OF_ALL

# Unweighted means of metrics on different documents: name -> its metrics.
MEANS: dict[str, tuple[str, ...]] = {
    **{name: mean.members for name, mean in TASK_MEANS.items()},
    **{
        f"ethics_{kind}_mean": tuple(f"{x}_{kind}" for x in TASK_MEANS["ethics_mean"].members)
        for kind in BESIDE_OF_ALL
    },
}


@dataclass(frozen=True)
class DocumentScores:
    """One metric of one evaluation, document by document."""

    task: str  # truthfulqa_mc2, ethics_virtue, ...
    metric: str  # truthfulqa_mc2, truthfulqa_mc2_length_normalised, ethics_virtue_auroc, ...
    doc_ids: np.ndarray  # (num_documents,) int64
    clusters: np.ndarray  # (num_documents,) int64; documents of one are not independent
    values: np.ndarray  # (num_documents,) float64; their mean is the metric


def document_scores(items: Items, base_items: Items | None = None) -> dict[str, DocumentScores]:
    """By metric: the tasks' own metrics (Task.metrics) and those beside them (Task.beside).

    base_items: of the base model on the same documents, for metrics that refer to it. A metric that
    is not a mean over documents (AUROC, balanced accuracy) has pseudo-values with its mean and
    variance. Metrics that these items do not allow are missing: without base_items, of an older
    evaluation, where one answer is always right. Raises UserError for base_items of other
    documents.
    """
    found = {}
    for name, rows in items.items():
        task, base = TASKS[name], None if base_items is None else base_items.get(name)
        if base is not None and _documents(rows) != _documents(base):
            raise UserError(
                f"{name}: the base model was not scored on the same documents. Evaluate both "
                "models on the same files and the same --limit"
            )
        columns = {x.row: [x.value(item) for item in rows] for x in task.metrics}
        columns |= {f"{name}_{kind}": x for kind, x in task.beside(rows, base).items()}
        doc_ids = np.array([item["doc_id"] for item in rows], np.int64)
        clusters = clusters_of(rows)
        for metric, column in columns.items():
            values = np.array(column, np.float64)
            kept = ~np.isnan(values)  # NaN: not one of the metric's documents
            found[metric] = DocumentScores(
                name, metric, doc_ids[kept], clusters[kept], values[kept]
            )
    return found


def _documents(rows: list[dict]) -> list[tuple]:
    return [(item["doc_id"], item["sha256"]) for item in rows]


def clusters_of(rows: list[dict]) -> np.ndarray:
    """(num_documents,) int64: scenarios of ETHICS, categories of TruthfulQA, else each its own."""
    numbers: dict[tuple, int] = {}
    keys = [_cluster(item) for item in rows]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _cluster(item: dict) -> tuple:
    if "group_id" in item:
        return "group", item["group_id"]
    if "category" in item:
        return "category", item["category"]
    return "document", item["doc_id"]
