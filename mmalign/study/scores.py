"""Every score of every document of a study's finished runs, and documents.parquet that holds them.

One row per (parent, variant, seed, metric, document): parent, variant, seed (-1: base), task,
metric, doc_id, cluster (documents of one are not independent) and value. The mean of `value` over a
metric's documents is the metric. The same runs give the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.evaluation.document_scores import MEANS, DocumentScores, document_scores
from mmalign.evaluation.items import read_items
from mmalign.files import read_json, read_text, replacing
from mmalign.study.contrasts import BASE, RunKey
from mmalign.study.forgetting import parse_task, path_of
from mmalign.study.identity import Order, Orders
from mmalign.study.pictures import RunScores, add_zeros, picture_scores
from mmalign.study.plan import PRETRAIN, Run

VISUAL = "visual_questions"  # right with the own image; the others are named after it
VISUAL_KINDS = ("another", "none", "over_another", "over_none")
_NAME = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    [
        *((name, _NAME) for name in ("parent", "variant")),
        ("seed", pa.int32()),
        *((name, _NAME) for name in ("task", "metric")),
        *((name, pa.int64()) for name in ("doc_id", "cluster")),
        ("value", pa.float64()),
    ]
)


def key_of(run: Run) -> RunKey:
    return run.parent, run.variant, run.seed


def collect(orders: Orders) -> dict[RunKey, RunScores]:
    """The scores of all runs that are done, sorted by parent, variant and seed."""
    done = [
        run for run in orders.study.runs if run.variant != PRETRAIN and orders.state(run) == "done"
    ]
    bases = {x.parent: read_items(orders[x].scores) for x in done if x.variant == BASE}
    found = {}
    for run in sorted(done, key=key_of):
        order = orders[run]
        base = bases.get(run.parent)
        items = base if run.variant == BASE else read_items(order.scores)
        assert items is not None
        of_texts = document_scores(items, base) | _forgetting(order)
        found[key_of(run)] = of_texts | _visual(order) | picture_scores(order)
    add_zeros(found)
    return found


def score(run: Mapping[str, DocumentScores], metric: str) -> float | None:
    """Of one run, 0 to 1; None where it has no such metric."""
    members = MEANS.get(metric, (metric,))
    if any(member not in run for member in members):
        return None
    return float(np.mean([run[member].values.mean() for member in members]))


def write_parquet(path: Path, scores: Mapping[RunKey, RunScores]) -> None:
    with replacing(path, "wb") as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd") as out:
        for (parent, variant, seed), metrics in scores.items():
            rows = sorted(metrics.values(), key=lambda x: (x.task, x.metric))
            sizes = [len(x.values) for x in rows]
            columns = [
                _repeated([parent] * len(rows), sizes),
                _repeated([variant] * len(rows), sizes),
                pa.array(np.full(sum(sizes), seed, np.int32)),
                _repeated([x.task for x in rows], sizes),
                _repeated([x.metric for x in rows], sizes),
                *(
                    pa.array(np.concatenate([getattr(x, name) for x in rows]))
                    for name in ("doc_ids", "clusters", "values")
                ),
            ]
            out.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))


def _repeated(names: list[str], sizes: list[int]) -> pa.DictionaryArray:
    known = sorted(set(names))
    indices = np.repeat([known.index(name) for name in names], sizes).astype(np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(known))


def _visual(order: Order) -> RunScores:
    """Answers about pictures, and what the own picture adds to another one and to none.

    A model that sees no picture gives the same answer each time: it adds 0.
    """
    asked = order.evaluation
    if asked is None or not asked.visual_questions:
        return {}
    images = [x.get("image") for x in json.loads(read_text(asked.visual_questions))]
    clusters = np.unique(np.array(images, str), return_inverse=True)[1].astype(np.int64)
    zeros = np.zeros(len(images))
    columns = {f"{VISUAL}_over_another": zeros, f"{VISUAL}_over_none": zeros}
    path = order.folder / "visual.json"
    if path.exists():
        right = {image: np.array(x, np.float64) for image, x in read_json(path).items()}
        own, another, none = (right[x] for x in ("own", "mismatched", "none"))
        columns = {
            VISUAL: own,
            f"{VISUAL}_another": another,
            f"{VISUAL}_none": none,
            f"{VISUAL}_over_another": own - another,
            f"{VISUAL}_over_none": own - none,
        }
    doc_ids = np.arange(len(images), dtype=np.int64)
    return {
        metric: DocumentScores(VISUAL, metric, doc_ids, clusters, values)
        for metric, values in columns.items()
    }


def _forgetting(order: Order) -> RunScores:
    """What run.py has taken from lm-evaluation-harness: right or wrong, sample by sample."""
    found = {}
    for name in order.evaluation.forgetting if order.evaluation else ():
        for metric, rows in read_json(path_of(order.folder / "forgetting", name)).items():
            doc_ids = np.array(rows["doc_ids"], np.int64)
            values = np.array(rows["values"], np.float64)
            found[metric] = DocumentScores(parse_task(name)[0], metric, doc_ids, doc_ids, values)
    return found
