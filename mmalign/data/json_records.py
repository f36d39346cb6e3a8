"""The JSON objects of a data file, a list or one per line, with their places in its text.

Whatever else is in the file is named: another format, other JSON, the line of a mistake.
"""

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmalign.errors import UserError, readable
from mmalign.files import open_regular

MAX_FILE_BYTES = 2**32  # text and its samples take up to 6 times that in memory
GZIP = b"\x1f\x8b"
MAX_DEPTH = 32  # objects and lists in each other; published samples have 3
REPEATED = "\0repeated"  # the entry of an object that names a key which it has more than once
_MOST_DIGITS = 300  # an integer with more (Python refuses 4300) stays text
_BLANKS = re.compile(r"[ \t\n\r]*")
_OTHER_FORMATS = (  # first bytes -> what it is, what to do
    (b"PK\x03\x04", "a zip archive", "Unpack it first (unzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it first (unzstd)"),
    (b"\xfd7zXZ", "compressed with xz", "Unpack it first (unxz)"),
    (b"BZh", "compressed with bzip2", "Unpack it first (bunzip2)"),
    (b"PAR1", "a Parquet file", "Save its rows as JSON lines"),
    (b"ARROW1", "an Arrow file", "Name the folder that save_to_disk has written, or Parquet files"),
    (b"\xff\xff\xff\xff", "an Arrow file", "Name the folder that save_to_disk has written"),
    (b"GGUF", "GGUF weights", "Name the file of the samples"),
    (b"version https://git-lfs", "a Git LFS pointer", "Download the file itself (git lfs pull)"),
    (b"\x80\x02", "a pickle", "Name the file of the samples"),
    (GZIP, "compressed with gzip twice", "Unpack it once (gunzip)"),
    (b"\xff\xfe\0\0", "UTF-32 text", "Convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"[\0", "UTF-16 text", "Convert it: iconv -f UTF-16LE -t UTF-8"),
    (b"{\0", "UTF-16 text", "Convert it: iconv -f UTF-16LE -t UTF-8"),
    (b"\0[", "UTF-16 text", "Convert it: iconv -f UTF-16BE -t UTF-8"),
    (b"\0{", "UTF-16 text", "Convert it: iconv -f UTF-16BE -t UTF-8"),
)


def read_text(path: Path) -> tuple[str, str]:
    """The file's text, unpacked where gzip has packed it, and the SHA-256 of its bytes."""
    try:
        with open_regular(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > MAX_FILE_BYTES:
                raise UserError(
                    f"the data file {path} has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} "
                    "are read into memory. Take a part of its samples"
                )
            content = file.read()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the data file {path} ({reason})") from error
    file_hash = hashlib.sha256(content).hexdigest()
    if content.startswith(GZIP):
        content = _unpacked(path, content)
    for start, kind, remedy in _OTHER_FORMATS:
        if content.startswith(start):
            raise UserError(f"the data file {path} is {kind}, expected JSON. {remedy}")
    if content[8:10] == b'{"' and b"\0" in content[:8]:
        raise UserError(
            f"the data file {path} is a safetensors file, expected JSON. Name the samples' file"
        )
    if content[257:262] == b"ustar":
        raise UserError(
            f"the data file {path} is a tar archive, expected JSON. Unpack it first (tar -xf); "
            "pictures may stay in it (--data.image-root)"
        )
    try:
        return content.decode("utf-8-sig"), file_hash
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error


def _unpacked(path: Path, content: bytes) -> bytes:
    """What gzip has packed; measured before it takes memory."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            num_bytes = 0
            while piece := file.read(2**20):
                num_bytes += len(piece)
                if num_bytes > MAX_FILE_BYTES:
                    raise UserError(
                        f"the data file {path} unpacks to more than {MAX_FILE_BYTES:,} bytes, the "
                        "most that are read into memory. Take a part of its samples"
                    )
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"the data file {path} is not a complete gzip file ({error}). Download or pack it again"
        ) from error


def records(path: Path, text: str) -> Iterator[tuple[int, int, dict]]:
    """(begin, end, object) of every sample; begin and end are positions in text."""
    start = _skip_blanks(text, 0)
    entries = _list_entries if text.startswith("[", start) else _line_entries
    try:
        if text.startswith("{", start):
            _refuse_one_object(path, text, start)
        for begin, end, record in entries(text, start):
            if not isinstance(record, dict):
                raise json.JSONDecodeError("Expecting an object, a sample", text, begin)
            yield begin, end, record
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed JSON "
            f"({readable(error.msg)}). Expected a list of samples, or one sample per line"
        ) from error


def parse(text: bytes) -> dict:
    """One object that `records` has yielded."""
    return _DECODER.decode(text.decode())


def _refuse_one_object(path: Path, text: str, begin: int) -> None:
    """The whole file is one object, such as {"data": [...]}, and not a line with a sample."""
    try:
        value, end = _decode(text, begin)
    except json.JSONDecodeError:
        return  # read line by line, it is named with its line
    is_whole = _skip_blanks(text, end) == len(text)
    if is_whole and isinstance(value, dict) and "conversations" not in value:
        keys = readable(", ".join(map(repr, list(value)[:10])), 200)
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        remedy = f". Save the list under {readable(lists[0], 50)!r} alone" if lists else ""
        raise UserError(
            f"{path}: found one object (with the keys {keys}), expected a list of samples, or one "
            f"sample per line{remedy}"
        )
    if "\n" in text[begin:end]:
        line, last = text.count("\n", 0, begin) + 1, text.count("\n", 0, end) + 1
        raise UserError(
            f"{path}: found an object on the lines {line} to {last}, expected a list of samples, "
            "or one sample per line. Write [ in front of the first object, ] behind the last one, "
            "and a comma between two"
        )


def _skip_blanks(text: str, begin: int) -> int:
    match = _BLANKS.match(text, begin)
    return match.end() if match else begin


def _list_entries(text: str, begin: int) -> Iterator[tuple[int, int, object]]:
    begin = _skip_blanks(text, begin + 1)
    closed = text.startswith("]", begin)
    while not closed:
        record, end = _decode(text, begin)
        yield begin, end, record
        begin = _skip_blanks(text, end)
        closed = text.startswith("]", begin)
        if not closed:
            if not text.startswith(",", begin):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, begin)
            begin = _skip_blanks(text, begin + 1)
    begin = _skip_blanks(text, begin + 1)
    if begin < len(text):
        raise json.JSONDecodeError("Extra data", text, begin)


def _line_entries(text: str, begin: int) -> Iterator[tuple[int, int, object]]:
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        line = text[begin:end]
        if line.strip():
            first = begin + _skip_blanks(line, 0)
            try:
                record, stop = _decode(line, first - begin)
                stop = _skip_blanks(line, stop)
                if stop < len(line):
                    raise json.JSONDecodeError("Extra data", line, stop)
            except json.JSONDecodeError as error:  # raised again with its position in the file
                raise json.JSONDecodeError(error.msg, text, begin + error.pos) from error
            yield begin, end, record
        begin = end + 1


def _decode(text: str, begin: int) -> tuple[object, int]:
    """The value that begins there, and its end."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, begin) from None
    num_opened = text.count("[", begin, end) + text.count("{", begin, end)
    if num_opened > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise json.JSONDecodeError("nested too deeply", text, begin)
    return value, end


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        depth += 1
    return depth


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Without what is null, as the rows of tables."""
    found = {key: value for key, value in pairs if value is not None}
    if len(found) < len(pairs) and len(dict(pairs)) < len(pairs):
        # json would keep the last value in silence
        found[REPEATED] = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return found


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
