"""Data files as they lie there: JSON, Parquet, folders of Hugging Face, each as JSON objects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.data.json_records import GZIP, read_text, records
from mmalign.data.table import Table
from mmalign.data.tables import is_tables, read_tables, table_files


@dataclass(frozen=True)
class Source:
    """One data file, or one folder of them."""

    container: str  # for people: "JSON lines", "Parquet, 3 files"
    fingerprint: str  # of the rows, and of the files that have pictures in them
    rows: Iterator[tuple[bytes, dict]]  # each as JSON, and parsed
    tables: Mapping[str, Table]  # of pictures inside, by the names that theirs begin with


def open_source(path: Path) -> Source:
    """Raises UserError for a file or folder that cannot be read, also while `rows` is iterated."""
    if is_tables(path):
        return Source(*read_tables(path))
    text, file_hash = read_text(path)
    rows = ((text[begin:end].encode(), record) for begin, end, record in records(path, text))
    container = "a JSON list" if text[:1000].lstrip().startswith("[") else "JSON lines"
    with open(path, "rb") as file:
        container += " in gzip" if file.read(len(GZIP)) == GZIP else ""
    return Source(container, file_hash, rows, {})


def source_files(path: Path) -> list[tuple[str, Path]]:
    """Every file that open_source reads, and its name in the folder; empty: the path itself."""
    return [(file.name, file) for file in table_files(path)] if path.is_dir() else [("", path)]
