"""Documents to score: the real sets where a folder with them is at hand, else the toy world's."""

import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mmalign.evaluation.tasks import load_documents, resolve_tasks
from mmalign.evaluation.tasks.task import Document
from mmalign.toy_world.corpus import corpus_pages, write_evaluation
from mmalign.toy_world.models import train_tokenizer

REAL = Path(os.environ.get("MMALIGN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def is_real() -> bool:
    return (REAL / "truthfulqa").is_dir() and (REAL / "llama_tokenizer").is_dir()


@cache
def _toy_folder() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory(prefix="mmalign-examination-")
    write_evaluation(Path(made.name), seed=0, num_documents=1000)
    train_tokenizer(corpus_pages(100, passages=12, seed=0), 900, tokenizer_file(Path(made.name)))
    return made


def tokenizer_file(folder: Path) -> Path:
    return folder / "tokenizer.model"


def tokenizer_model() -> Path:
    """sentencepiece's model: LLaMA's, or one of 900 pieces trained on the toy world's texts."""
    if is_real():
        return tokenizer_file(REAL / "llama_tokenizer")
    return tokenizer_file(Path(_toy_folder().name))


def documents(tasks: Sequence[str], limit: int) -> list[Document]:
    """About `limit` documents of each task (or of each task of a group, as `ethics`)."""
    root = REAL if is_real() else Path(_toy_folder().name)
    found = load_documents(resolve_tasks(tasks), root, None)
    return [document for rows in found.values() for document in spread(rows, limit)]


def spread(rows: Sequence[Document], limit: int) -> list[Document]:
    """At least `limit` documents, at equal distances: a file may begin with its short ones.

    Those about one scenario stay together, as they share a prefix.
    """
    groups: dict[tuple[str, int], list[Document]] = {}
    for row in rows:
        key = ("alone", row.doc_id) if row.group_id is None else ("group", row.group_id)
        groups.setdefault(key, []).append(row)
    mean = len(rows) / len(groups)
    wanted = min(len(groups), math.ceil(limit / mean))
    chosen = [list(groups.values())[i * len(groups) // wanted] for i in range(wanted)]
    return [document for group in chosen for document in group]
