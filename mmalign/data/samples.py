"""The samples of a file in LLaVA's JSON format, kept as bytes and parsed lazily.

The format, as published: a list (or one object per line) of
    {"id": str or int, "image": path or absent, "type": optional,
     "conversations": [{"from": "human" or "gpt", "value": text with "<image>"}, ...]}
Other fields are ignored. `type` is conversation, detail or reasoning; the spellings of
the published files and questions (conv, conversation_58k, detail_23k, detail_description, complex,
complex_reasoning, complex_reasoning_77k) are mapped to these.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np

from mmalign.config import DataConfig
from mmalign.errors import SampleError, UserError

_TYPES = {
    "conv": "conversation",
    "conversation_58k": "conversation",
    "detail_23k": "detail",
    "detail_description": "detail",
    "complex": "reasoning",
    "complex_reasoning": "reasoning",
    "complex_reasoning_77k": "reasoning",
}
_BLANKS = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Turn:
    speaker: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    conversations: tuple[Turn, ...]
    image: str | None
    type: str | None


class SampleFile(Sequence[Sample]):
    """The selected samples of one file as a single block of bytes and offsets into it.

    A list of 595k parsed samples would take gigabytes, and a copy in every worker process.
    Indexing parses one sample and raises SampleError if it does not follow the format.
    """

    def __init__(self, content: bytes, ends: np.ndarray, numbers: np.ndarray, fingerprint: str):
        self._content = content  # the samples' JSON, one after the other, UTF-8
        self._ends = ends  # (num_samples,) int64; end of each in content
        # (num_samples,) int64; position in the file, or -1 - position if that is also the id
        self._numbers = numbers
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = self._ends[index - 1] if index else 0
        record = json.loads(self._content[begin : self._ends[index]])
        number = int(self._numbers[index])
        return _parse(record, str(record["id"]) if number >= 0 else str(-1 - number))


def read_samples(path: str | Path, data: DataConfig) -> SampleFile:
    """Read a JSON list or JSON lines; keep the samples selected by data.types and num_samples.

    A missing or repeated id is replaced by the sample's position in the file.

    Raises:
        UserError: no such file, malformed JSON (with line and column), nothing selected.
    """
    path = Path(path)
    text, file_hash = _read_text(path)
    wanted = {_TYPES.get(name, name) for name in data.types}
    limit = math.inf if data.num_samples is None else data.num_samples
    if limit < 1:
        raise UserError(f"--data.num-samples is {limit}, expected at least 1")
    content, ends, numbers, seen_ids, seen_types = bytearray(), [], [], set(), Counter()
    for number, (begin, end, record) in enumerate(_records(path, text)):
        kind = _type_of(record)
        seen_types[kind] += 1
        sample_id = _id_of(record)
        usable_id = sample_id is not None and sample_id not in seen_ids
        seen_ids.add(sample_id)
        if wanted and kind not in wanted:
            continue
        content += text[begin:end].encode()
        ends.append(len(content))
        numbers.append(number if usable_id else -1 - number)
        if len(ends) == limit:
            break
    if not ends or wanted - set(seen_types) and len(ends) < limit:
        raise UserError(_nothing_selected(path, wanted, seen_types))
    fingerprint = f"{file_hash} {sorted(wanted)} {data.num_samples}"
    return SampleFile(bytes(content), np.array(ends), np.array(numbers), fingerprint)


def _read_text(path: Path) -> tuple[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the data file {path} ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error


def _records(path: Path, text: str) -> Iterator[tuple[int, int, dict]]:
    """(begin, end, object) of every sample; begin and end are positions in text."""
    start = _skip_blanks(text, 0)
    entries = _list_entries if text.startswith("[", start) else _line_entries
    try:
        for begin, end, record in entries(text, start):
            if not isinstance(record, dict):
                raise json.JSONDecodeError("Expecting an object, a sample", text, begin)
            yield begin, end, record
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}). "
            "Expected a list of samples, or one sample per line"
        ) from error


def _skip_blanks(text: str, begin: int) -> int:
    match = _BLANKS.match(text, begin)
    return match.end() if match else begin


def _list_entries(text: str, begin: int) -> Iterator[tuple[int, int, object]]:
    decode = json.JSONDecoder().raw_decode
    begin = _skip_blanks(text, begin + 1)
    closed = text.startswith("]", begin)
    while not closed:
        record, end = decode(text, begin)
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
    decode = json.JSONDecoder().decode
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        line = text[begin:end]
        if line.strip():
            try:
                record = decode(line)
            except json.JSONDecodeError as error:  # raised again with its position in the file
                raise json.JSONDecodeError(error.msg, text, begin + error.pos) from error
            yield begin, end, record
        begin = end + 1


def _id_of(record: dict) -> str | None:
    sample_id = record.get("id")
    return str(sample_id) if isinstance(sample_id, (str, int)) and sample_id != "" else None


def _type_of(record: dict) -> str | None:
    kind = record.get("type")
    return _TYPES.get(kind, kind) if isinstance(kind, str) else None


def _nothing_selected(path: Path, wanted: set[str], seen: Counter) -> str:
    if not seen:
        return f"{path} contains no samples"
    found = ", ".join(f"{count} {kind or 'without type'}" for kind, count in seen.most_common(10))
    missing = ", ".join(sorted(wanted - set(seen)))
    return f"{path}: no samples of type {missing} (--data.types). The file has: {found}"


def _parse(record: dict, sample_id: str) -> Sample:
    turns, image = record.get("conversations"), record.get("image")
    problem = None
    if not isinstance(turns, list):
        problem = f"its conversations are {type(turns).__name__}, expected a list of turns"
    elif not all(isinstance(turn, dict) for turn in turns):
        problem = "a turn is not an object with from and value"
    elif not all(isinstance(turn.get(key), str) for turn in turns for key in ("from", "value")):
        problem = "a turn lacks the text from or value"
    elif image is not None and (not isinstance(image, str) or not image):
        problem = f"its image is {image!r}, expected one path"
    if problem:
        raise SampleError(sample_id, problem, "Fix the sample or remove it from the file")
    conversations = tuple(Turn(turn["from"], turn["value"]) for turn in record["conversations"])
    return Sample(sample_id, conversations, image, _type_of(record))
