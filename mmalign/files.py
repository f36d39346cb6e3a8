"""Files: JSON, typed settings, JSON lines, Markdown tables, checksums, atomic replacement."""

import hashlib
import json
import os
import stat
import tempfile
import tomllib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from mmalign.errors import UserError

MAX_JSON_BYTES = 10**8
KIND_BYTES = 64
_KINDS = {  # first bytes, in lower case
    b"version https://git-lfs": "a git-LFS pointer, not the file itself. Download it: git lfs pull",
    b"gguf": "a GGUF file. Give the Hugging Face folder that it was made from",
    b"\x1f\x8b": "compressed with gzip. Unpack it",
    b"par1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"<!doctype": "a web page. Download the file again",
    b"<html": "a web page. Download the file again",
}


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Inside, an OSError that names no file, as of a full disk, gets the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | Path, mode: str = "w", newline: str | None = None) -> Iterator[IO]:
    """A file that takes the place of `path` when the block ends, whole or not at all.

    It is on the disk before it appears under its name, so a kill or a full disk leaves the old
    file, and several processes can write the same name. newline: as open() takes it.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    encoding = None if "b" in mode else "utf-8"
    try:
        with naming(path), os.fdopen(descriptor, mode, encoding=encoding, newline=newline) as file:
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


def require_file(path: str | Path, hint: str = "") -> None:
    """UserError where there is not a regular file: a FIFO would be waited for without end."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist. {hint}".rstrip())
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file. {hint}".rstrip())


def open_regular(path: str | Path) -> BufferedReader:
    """The file, open for reading; OSError where that fails.

    Raises UserError at once for what is not a regular file: a FIFO or a device may never end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path} is {kind}, expected a regular file")
    # a FIFO that takes the file's place in between must not block either
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_text(path: str | Path) -> str:
    """The file's UTF-8 text with its line ends as they are; UserError where it cannot be read.

    A byte order mark at the start, which Windows editors write, is removed.
    """
    require_file(path)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is {known_kind(path) or f'not UTF-8 text: {error}'}") from error


def known_kind(path: str | Path) -> str:
    """What a file is instead of what its name says, and what to do; empty: not known.

    To be asked after reading has failed: a good file may begin with the same bytes.
    """
    with open(path, "rb") as file:
        return kind_of(file.read(KIND_BYTES))


def kind_of(start: bytes) -> str:
    """As known_kind, of a file's first KIND_BYTES."""
    if not start:
        return "empty"
    return next((kind for magic, kind in _KINDS.items() if start.lower().startswith(magic)), "")


def read_json(path: str | Path, hint: str = "") -> dict:
    """The object in a JSON file.

    Raises UserError with the path, and with `hint` (what to do) where the file is missing.
    """
    require_file(path, hint)
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise UserError(f"{path} has more than {MAX_JSON_BYTES} bytes. {hint}".rstrip())
    value = read_json_value(path)
    try:  # escapes can spell half of a surrogate pair, which is not Unicode
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"{path}: not usable JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_value(path: str | Path, object_pairs_hook: Callable | None = None) -> Any:
    """Whatever a JSON file holds; UserError with the path, and the line of a mistake."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        kind = known_kind(path) or f"not valid JSON ({error.msg})"
        raise UserError(f"{path}, line {error.lineno}: {kind}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits; nesting
        raise UserError(f"{path}: not usable JSON ({error})") from error


def read_toml(path: str | Path) -> dict:
    """The tables of a TOML file; UserError with the path and the place of a mistake."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits; nesting
        raise UserError(f"{path}: not TOML ({error})") from error


class Settings:
    """A JSON object whose values are read with their type and range.

    Every UserError names the file, the key, what was expected and what was found. A key that is
    missing has its default; null counts as missing for flags, and elsewhere with null=True.
    """

    def __init__(self, values: dict, path: str | Path, within: str = ""):
        """within: the keys that lead to this object in the file, each with a dot behind it."""
        self.values, self.path, self.within = values, Path(path), within

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def error(self, key: str, expected: str, lead: str = "expected") -> UserError:
        found = repr(self.values.get(key))
        found = found if len(found) <= 80 else f"{found[:80]} ..."
        name = f"{self.within}{key}"[:100]
        return UserError(f"{self.path}: {name} is {found}; {lead} {expected}")

    def integer(self, key: str, low: int, high: int, default: int, null: bool = False) -> int:
        value = self._value(key, default, null)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(
        self, key: str, low: float, high: float, default: float, null: bool = False
    ) -> float:
        value = self._value(key, default, null)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, "a number")
        if not low <= value <= high:  # nor for NaN
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default, True)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def section(self, key: str) -> "Settings":
        """The object under a key; empty where it is missing or null."""
        value = self._value(key, {}, True)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Settings(value, self.path, f"{self.within}{key}.")

    def require(self, key: str, *allowed: Any) -> Any:
        """The value, which is one of `allowed`; None among them where the key may be absent."""
        if self.get(key) not in allowed:
            names = " or ".join(repr(x) for x in allowed if x is not None)
            raise self.error(key, names, "supported:")
        return self.get(key)

    def _value(self, key: str, default: Any, null: bool) -> Any:
        value = self.values.get(key, default)
        return default if value is None and null else value


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


def read_steps(path: str | Path) -> tuple[list[dict], list[str]]:
    """The records of metrics.jsonl, and a sentence for every line that is not a step's, in order.

    Steps ascend; of lines that contradict each other the fewest are left out. A last line without a
    line end was cut short by a kill and is left out silently.
    """
    records, wrong = {}, []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            numbers = (record["step"], record["loss"])
            if any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
                raise TypeError
            if record["step"] != int(record["step"]) or record["step"] < 1:
                raise ValueError
            float(record["loss"])
            records[number] = record
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            wrong.append(number)
    numbers = list(records)
    ascending = _ascending([record["step"] for record in records.values()])
    kept = [numbers[index] for index in ascending]
    wrong = sorted({*wrong, *numbers} - {*kept})
    problems = [f"{path}, line {number}: not the record of a step in order" for number in wrong]
    return [records[number] for number in kept], problems


def _ascending(values: Sequence[float]) -> list[int]:
    """Indices of a longest subsequence that ascends strictly, the first one where there are more.

    Patience sorting, from the end.
    """
    largest: list[float] = []  # negated first value of the subsequences of each length
    first: list[int] = []  # its index
    behind: dict[int, int | None] = {}  # of each value: the index of the one after it
    for index in reversed(range(len(values))):
        length = bisect_left(largest, -values[index])
        behind[index] = first[length - 1] if length else None
        largest[length : length + 1] = [-values[index]]
        first[length : length + 1] = [index]
    found, index = [], first[-1] if first else None
    while index is not None:
        found.append(index)
        index = behind[index]
    return found


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], rest: str = "---:"
) -> str:
    """First column to the left, the rest to the right unless `rest` says otherwise."""
    lines = [headings, [":---"] + [rest] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def sha256(path: str | Path) -> str:
    """Hex digest of the file's bytes; UserError where it is not a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
