"""A Parquet or Arrow file: rows as records, and the pictures inside them.

A picture is Hugging Face's struct of bytes and path (or plain bytes), alone or in a list. Its place
is ROW/COLUMN, with /NUMBER behind it in a list; its bytes are read when they are needed. Those of
an Arrow file are found at once. Parquet is read by row groups, so files with pictures should have
small ones: Hugging Face writes 100 rows.
"""

import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.archive import MAX_PICTURE_BYTES
from mmalign.data.forms import SYSTEM_FIELDS
from mmalign.data.parquet_footer import num_present, refuse_large, sizes_of_row_groups
from mmalign.errors import UserError
from mmalign.files import open_regular

MAX_GROUP_BYTES = 2**30  # of the pictures in a row group, which a worker holds at once
_MAX_TEXT_BYTES = 2**32  # of a row group without its pictures
_KEPT_GROUPS = 2  # last row groups that a process keeps
_TEXTS = ("id", "type", "instruction", "input", "output", *SYSTEM_FIELDS)  # never pictures
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow, at its end
_ROWS = 1024  # that become objects at a time
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_BYTES = (
    *(pa.types.is_binary, pa.types.is_large_binary),
    *(pa.types.is_binary_view, pa.types.is_fixed_size_binary),
)


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
        self._paths: dict[str, pa.ChunkedArray | None] = {}  # by column
        with _naming(path), open_regular(path):
            schema = self._schema()
        if twice := [x for x, number in Counter(schema.names).items() if number > 1]:
            raise UserError(f"{path} has several columns of the name {twice[0]!r}. Rename them")
        fields = [field for field in schema if field.name not in _TEXTS]
        self.columns = [field.name for field in fields if _holds_pictures(field.type)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None, "_paths": {}}

    def find(self, place: str) -> Cell | None:
        """The picture of a place, as in the names that name_of has made."""
        match = re.fullmatch(r"(\d{1,18})/(.+?)(?:/(\d{1,9}))?", place)
        if not match or match[2] not in self.columns:
            return None
        return Cell(self, int(match[1]), match[2], int(match[3]) if match[3] else None)

    def path_of(self, place: str) -> str | None:
        """Where the picture lay as a file, if the table says so."""
        if (cell := self.find(place)) is None:
            return None
        with _naming(self.path):
            found = self._path(cell.row, cell.column)
            found = found if cell.number is None else found[cell.number]
        return found.get("path") if isinstance(found, dict) else None

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
                        yield json.dumps(record, default=_in_json).encode(), record
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

    def _path(self, row: int, column: str) -> Any:
        """As `value`; its bytes may be left out."""
        return self.value(row, column)

    def _schema(self) -> pa.Schema:
        raise NotImplementedError

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        raise NotImplementedError


class ArrowTable(Table):
    """A file of save_to_disk, mapped into memory, which processes share."""

    def _schema(self) -> pa.Schema:
        return self._table().schema

    def _table(self) -> pa.Table:
        if self._open is None:
            source = pa.memory_map(str(self.path))
            is_file = source.read(6) == b"ARROW1"  # Arrow's other format; save_to_disk has streams
            source.seek(max(0, source.size() - len(_END_OF_STREAM)))
            if not is_file and source.read() != _END_OF_STREAM:  # pyarrow would read what is there
                raise pa.ArrowInvalid("it has no end mark, so rows may be missing")
            source.seek(0)
            self._open = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
            self._open.validate(full=True)  # otherwise a damaged offset reads anywhere in memory
        return self._open

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        table = self._table()
        for begin in range(0, table.num_rows, _ROWS):
            yield table.slice(begin, _ROWS), dict.fromkeys(self.columns)

    def value(self, row: int, column: str) -> Any:
        return self._table().column(column)[row].as_py()


class ParquetTable(Table):
    def _schema(self) -> pa.Schema:
        file = pq.ParquetFile(self.path)
        self._ends = np.cumsum(sizes_of_row_groups(file.metadata))  # (num_groups,)
        return file.schema_arrow

    def _parts(self) -> Iterator[tuple[pa.Table, dict[str, bool | None]]]:
        file = pq.ParquetFile(self.path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        # bytes are left out where a path beside them says which rows have a picture
        inside = [x for x in leaves if x.endswith(".bytes") and x.partition(".")[0] in self.columns]
        unread = [x for x in inside if x.removesuffix("bytes") + "path" in leaves]
        for group in range(file.num_row_groups):
            refuse_large(self.path, file, group, set(leaves) - set(unread), _MAX_TEXT_BYTES)
            table = file.read_row_group(group, [x for x in leaves if x not in unread])
            has_bytes: dict[str, bool | None] = dict.fromkeys(self.columns)
            for leaf in unread:
                column = leaf.partition(".")[0]
                num_bytes = num_present(file, group, leaves.index(leaf))
                if num_bytes in (0, _num_pictures(table.column(column))):
                    has_bytes[column] = num_bytes != 0
                else:
                    table = file.read_row_group(group)  # some have: all of it is read
            yield table, has_bytes

    def _path(self, row: int, column: str) -> Any:
        if column not in self._paths:
            file = pq.ParquetFile(self.path)
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            wanted = [x for x in leaves if x.startswith(f"{column}.") and x.endswith(".path")]
            self._paths[column] = file.read(wanted).column(column) if wanted else None
        paths = self._paths[column]
        return None if paths is None else paths[row].as_py()

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
            refuse_large(self.path, file, group, wanted, MAX_GROUP_BYTES)
            table = file.read_row_group(group, [column], use_threads=False)
            kept[group, column] = table.column(column)
            if len(kept) > _KEPT_GROUPS:
                kept.popitem(last=False)
        return kept[group, column]


def _num_pictures(column: pa.ChunkedArray) -> int:
    if _is_list(column.type):
        return sum(len(x) - x.null_count for x in (c.flatten() for c in column.chunks))
    return len(column) - column.null_count


def _holds_pictures(kind: pa.DataType) -> bool:
    if _is_list(kind) or pa.types.is_dictionary(kind):
        return _holds_pictures(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_pictures(kind.field(index).type)
    return any(is_kind(kind) for is_kind in _BYTES)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _LISTS)


def _in_json(value: Any) -> dict[str, str]:
    """Bytes and dates, which JSON lacks, as an object, so that nothing takes them for text."""
    about = f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)
    return {type(value).__name__: about}


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
