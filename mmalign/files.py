"""The project's own files: JSON, JSON lines, Markdown tables, checksums, atomic replacement."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmalign.errors import UserError


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file that takes the place of `path` when the block ends, whole or not at all.

    It is on the disk before it appears under its name, so a kill or a full disk leaves the old
    file, and several processes can write the same name.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replaces the file atomically."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Replaces the file atomically; indented, so that people can read and diff it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """Replaces the file atomically by one object per line."""
    with replacing(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_text(path: str | Path) -> str:
    """The file's UTF-8 text with its line ends as they are; UserError where it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: str | Path, hint: str = "") -> dict:
    """The object in a JSON file.

    Raises UserError with the path, and with `hint` (what to do) where the file is missing.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist. {hint}".rstrip())
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: str | Path, required: Collection[str] = ()) -> list[dict]:
    """The objects of a JSON lines file, which all have the required keys.

    A last line without a line end was cut short by a kill and is left out. Anything else that is
    not such an object raises UserError with its line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            missing = set(required) - row.keys()
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object") from error
        if missing:
            raise UserError(f"{path}, line {number}: {', '.join(sorted(missing))} missing")
        rows.append(row)
    return rows


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], rest: str = "---:"
) -> str:
    """First column to the left, the rest to the right unless `rest` says otherwise."""
    lines = [headings, [":---"] + [rest] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def sha256(path: str | Path) -> str:
    """Hex digest of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
