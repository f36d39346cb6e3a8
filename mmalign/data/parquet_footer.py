"""What the footer of a Parquet file says of the columns in its row groups."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.errors import UserError


def sizes_of_row_groups(metadata: pq.FileMetaData) -> list[int]:
    """Rows of each; ArrowInvalid for a damaged footer, also where pyarrow would end this process.

    pyarrow does not catch its own exception for statistics of a wrong length, so a child process
    looks at every column first.
    """
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ says of it names no file
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                for column in range(group.num_columns):
                    group.column(column)
        finally:
            os._exit(0)  # an exception of Python comes again in the parent
    _, status = os.waitpid(child, 0)
    if status:
        raise pa.ArrowInvalid("its footer is damaged")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(sizes) != metadata.num_rows:
        what = f"its row groups have {sum(sizes):,} rows, the file {metadata.num_rows:,}"
        raise pa.ArrowInvalid(what)
    return sizes


def refuse_large(path: Path, file: pq.ParquetFile, group: int, leaves: set[str], most: int) -> None:
    """UserError where these columns of a row group are larger than `most` bytes."""
    about = file.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    size = sum(x.total_uncompressed_size for x in columns if x.path_in_schema in leaves)
    if size > most:
        raise UserError(
            f"{path}: row group {group} unpacks to {size:,} bytes, at most {most:,} are read at "
            "once. Write it with smaller row groups, such as 100 rows"
        )


def num_present(file: pq.ParquetFile, group: int, leaf: int) -> int | None:
    """Values that are not null; None where the file does not say."""
    column = file.metadata.row_group(group).column(leaf)
    if not column.is_stats_set or not column.statistics.has_null_count:
        return None
    return column.statistics.num_values
