"""Data files of tables: Parquet, and folders of Hugging Face datasets."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmalign.data.table import ArrowTable, ParquetTable, Table
from mmalign.errors import UserError
from mmalign.files import open_regular, read_json

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")


def is_tables(path: Path) -> bool:
    if path.is_dir():
        return True
    try:
        with open_regular(path) as file:
            return file.read(4) == b"PAR1"
    except (OSError, ValueError):  # whoever reads it as text says why
        return False


def open_table(path: Path) -> Table | None:
    """The table in a file; None for a file of another kind. UserError for a damaged one."""
    if path.is_dir():
        return None
    return (
        ParquetTable(path)
        if is_tables(path)
        else ArrowTable(path)
        if path.suffix == ".arrow"
        else None
    )


def table_files(path: Path) -> list[Path]:
    """The files of a folder, or the file itself; UserError for a folder that has none of a kind."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(str(path / x.parent.name) for x in sorted(path.glob("*/state.json")))
        splits = splits or "none is there, so download it again"
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
    others = [x.stem for x in files if not _SHARD.fullmatch(x.name)] if shards else []
    if len(shards) + len(others) > 1:
        raise UserError(
            f"{path} has files of several splits: {', '.join([*shards, *others[:5]])}. Put those "
            "of one into a folder of their own"
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


def read_tables(path: Path) -> tuple[str, str, Iterator[tuple[bytes, dict]], dict[str, Table]]:
    """The fields of a Source; the fingerprint is of names, sizes and times of change."""
    files = table_files(path)
    is_saved = (path / "state.json").exists()
    tables = [ArrowTable(x) if is_saved else ParquetTable(x) for x in files]
    kind = "a saved dataset" if is_saved else "Parquet"
    container = kind if len(files) == 1 else f"{kind}, {len(files)} files"
    facts = [(x.path.name, os.stat(x.path).st_size, os.stat(x.path).st_mtime_ns) for x in tables]
    rows = (row for table in tables for row in table.rows())
    return container, str(facts), rows, {x.path.name: x for x in tables if x.columns}
