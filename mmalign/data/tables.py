"""Parquet files and folders of Hugging Face datasets: rows as records, pictures inside them.

A picture is Hugging Face's struct of bytes and path (or plain bytes), alone or in a list. Its name
is FILE#ROW/COLUMN, with /NUMBER behind it in a list; its bytes are read when they are needed. Those
of a saved dataset are found at once. Parquet is read by row groups, so files with pictures should
have small ones: Hugging Face writes 100 rows.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.archive import MAX_PICTURE_BYTES
from mmalign.errors import UserError
from mmalign.files import open_regular, read_json

MAX_GROUP_BYTES = 2**30  # of the pictures in a row group, which a worker holds at once
_MAX_TEXT_BYTES = 2**32  # of a row group without its pictures
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
_KEPT_GROUPS = 2  # last row groups that a process keeps
_ROWS = 1024  # that become objects at a time


def is_tables(path: Path) -> bool:
    if path.is_dir():
        return True
    try:
        with open_regular(path) as file:
            return file.read(4) == b"PAR1"
    except (OSError, ValueError):  # whoever reads it as text says why
        return False


def table_files(path: Path) -> list[Path]:
    """The files of a folder, or the file itself; UserError for a folder that has none of a kind."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(str(path / x.parent.name) for x in sorted(path.glob("*/state.json")))
        raise UserError(f"{path} holds the splits of a dataset. Name one of them: {splits}")
    if (path / "state.json").exists():
        return _saved_files(path)
    files = sorted(path.glob("*.parquet"))
    if not files:
        inside = sorted({x.parent for x in path.glob("*/*.parquet")})
        hint = f". Name the folder of its files: {', '.join(map(str, inside))}" if inside else ""
        raise UserError(
            f"{path} is a folder, expected a JSON file, or a folder with Parquet files or what "
            f"save_to_disk of Hugging Face datasets has written{hint}"
        )
    shards = {match[1]: int(match[2]) for x in files if (match := _SHARD.fullmatch(x.name))}
    if len(shards) > 1:
        raise UserError(
            f"{path} has files of several splits: {', '.join(shards)}. Put those of one into a "
            "folder of their own"
        )
    if shards and len(files) != next(iter(shards.values())):
        number = next(iter(shards.values()))
        raise UserError(f"{path} has {len(files)} of {number} files. Download the others")
    return files


def _saved_files(path: Path) -> list[Path]:
    state = read_json(path / "state.json")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: no list _data_files of filenames") from error
    if state.get("_indices_data_files"):
        raise UserError(f"{path} was saved with indices. Save dataset.flatten_indices() instead")
    if strange := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path / 'state.json'}: {strange[0]!r} is no name of a file beside it")
    if not names:
        raise UserError(f"{path} contains no samples")
    return [path / name for name in names]


def read_tables(path: Path) -> tuple[str, str, Iterator[tuple[bytes, dict]], dict[str, "Table"]]:
    """The fields of a Source; the fingerprint is of names, sizes and times of change."""
    files = table_files(path)
    is_saved = (path / "state.json").exists()
    tables = [_Arrow(x) if is_saved else _Parquet(x) for x in files]
    kind = "a saved dataset" if is_saved else "Parquet"
    container = kind if len(files) == 1 else f"{kind}, {len(files)} files"
    facts = [(x.path.name, os.stat(x.path).st_size, os.stat(x.path).st_mtime_ns) for x in tables]
    rows = (row for table in tables for row in table.rows())
    return container, str(facts), rows, {x.path.name: x for x in tables if x.columns}


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of a table."""

    table: "Table"
    row: int
    column: str
    number: int | None  # in a list

    def __str__(self) -> str:
        return self.table.name_of(self.row, self.column, self.number)

    def check(self) -> None: ...  # whoever has made its name has seen it

    def read(self) -> bytes:
        with _naming(self.table.path):
            found = self.table.value(self.row, self.column)
            found = found if self.number is None else found[self.number]
        content = found.get("bytes") if isinstance(found, dict) else found
        if not isinstance(content, bytes):
            raise UserError(f"{self} holds no bytes")
        if len(content) > MAX_PICTURE_BYTES:
            raise UserError(f"{self} is too large ({len(content):,} bytes). Scale the image down")
        return content


class Table:
    """One file; `columns` are those that hold pictures."""

    def __init__(self, path: Path):
        self.path = path
        self._open: Any = None
        with _naming(path), open_regular(path):
            schema = self._schema()
        self.columns = [field.name for field in schema if _holds_pictures(field.type)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None}

    def find(self, name: str) -> Cell | None:
        """The picture of a name that name_of has made."""
        rest = name.removeprefix(f"{self.path.name}#")
        match = re.fullmatch(r"(\d{1,18})/(.+?)(?:/(\d{1,9}))?", rest)
        if rest == name or not match or match[2] not in self.columns:
            return None
        return Cell(self, int(match[1]), match[2], int(match[3]) if match[3] else None)

    def name_of(self, row: int, column: str, number: int | None) -> str:
        return f"{self.path.name}#{row}/{column}" + ("" if number is None else f"/{number}")

    def rows(self) -> Iterator[tuple[bytes, dict]]:
        """Each as JSON and as an object, without what is null; a picture is its name or path."""
        first = 0
        with _naming(self.path):
            for table, has_bytes in self._parts():
                for batch in table.to_batches(_ROWS):
                    for row, record in enumerate(batch.to_pylist(), first):
                        for column in self.columns:
                            if record[column] is not None:
                                named = self._named(row, column, record[column], has_bytes[column])
                                record[column] = named
                        record = _without_nulls(record)
                        yield json.dumps(record, default=str).encode(), record
                    first += batch.num_rows

    def _named(self, row: int, column: str, value: Any, has_bytes: bool | None) -> Any:
        """has_bytes: of the whole part; None: what was read says it."""

        def name(picture: Any, number: int | None) -> Any:
            known = picture.get("bytes") if isinstance(picture, dict) else picture
            if has_bytes or (has_bytes is None and known is not None):
                return self.name_of(row, column, number)
            return picture.get("path") if isinstance(picture, dict) else None

        if isinstance(value, list):
            return [name(x, i) for i, x in enumerate(value) if x is not None]
        return name(value, None)

    def value(self, row: int, column: str) -> Any:
        raise NotImplementedError

    def _schema(self) -> pa.Schema:
        raise NotImplementedError

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        raise NotImplementedError


class _Arrow(Table):
    """A file of save_to_disk, mapped into memory, which processes share."""

    def _schema(self) -> pa.Schema:
        return self._table().schema

    def _table(self) -> pa.Table:
        if self._open is None:
            self._open = pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()
            self._open.validate(full=True)  # otherwise a damaged offset reads anywhere in memory
        return self._open

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        table = self._table()
        for begin in range(0, table.num_rows, _ROWS):
            yield table.slice(begin, _ROWS), dict.fromkeys(self.columns)

    def value(self, row: int, column: str) -> Any:
        return self._table().column(column)[row].as_py()


class _Parquet(Table):
    def _schema(self) -> pa.Schema:
        file = pq.ParquetFile(self.path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = np.cumsum(sizes)  # (num_groups,)
        return file.schema_arrow

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        file = pq.ParquetFile(self.path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        # bytes are left out where a path beside them says which rows have a picture
        inside = [x for x in leaves if x.endswith(".bytes") and x.partition(".")[0] in self.columns]
        unread = [x for x in inside if x.removesuffix("bytes") + "path" in leaves]
        for group in range(file.num_row_groups):
            _refuse_large(self.path, file, group, set(leaves) - set(unread), _MAX_TEXT_BYTES)
            table = file.read_row_group(group, [x for x in leaves if x not in unread])
            has_bytes: dict[str, bool | None] = dict.fromkeys(self.columns)
            for leaf in unread:
                column = leaf.partition(".")[0]
                num_bytes = _num_present(file, group, leaves.index(leaf))
                if num_bytes in (0, _num_pictures(table.column(column))):
                    has_bytes[column] = num_bytes != 0
                else:
                    table = file.read_row_group(group)  # some have: all of it is read
            yield table, has_bytes

    def value(self, row: int, column: str) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        return self._group(group, column)[row - first].as_py()

    def _group(self, group: int, column: str) -> pa.ChunkedArray:
        if self._open is None or self._open[0] != os.getpid():  # pyarrow's handle is not for a fork
            self._open = os.getpid(), pq.ParquetFile(self.path), OrderedDict()
        _, file, kept = self._open
        if (group, column) not in kept:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            wanted = {x for x in leaves if x == column or x.startswith(f"{column}.")}
            _refuse_large(self.path, file, group, wanted, MAX_GROUP_BYTES)
            table = file.read_row_group(group, [column], use_threads=False)
            kept[group, column] = table.column(column)
            if len(kept) > _KEPT_GROUPS:
                kept.popitem(last=False)
        return kept[group, column]


def _refuse_large(
    path: Path, file: pq.ParquetFile, group: int, leaves: set[str], most: int
) -> None:
    about = file.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    size = sum(x.total_uncompressed_size for x in columns if x.path_in_schema in leaves)
    if size > most:
        raise UserError(
            f"{path}: row group {group} unpacks to {size:,} bytes, at most {most:,} are read at "
            "once. Write it with smaller row groups, such as 100 rows"
        )


def _num_present(file: pq.ParquetFile, group: int, leaf: int) -> int | None:
    """Values that are not null; None where the file does not say."""
    column = file.metadata.row_group(group).column(leaf)
    if not column.is_stats_set or not column.statistics.has_null_count:
        return None
    return column.statistics.num_values


def _num_pictures(column: pa.ChunkedArray) -> int:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return sum(len(x) - x.null_count for x in (c.flatten() for c in column.chunks))
    return len(column) - column.null_count


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_pictures(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_nulls(value: Any) -> Any:
    """Tables have every field in every row, null where JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"cannot read the data file {path} ({error}). Download it again, or save it as JSON"
        ) from error
