"""The samples of a data file, kept as JSON and parsed lazily.

Other forms are turned into LLaVA's (forms.py), as published:
    {"id": str or int, "image": path, list of paths or absent, "type": optional,
     "conversations": [{"from": "human" or "gpt", "value": text with "<image>"}, ...]}
A list, as LLaVA-NeXT-Interleave has it, names the pictures in the order of their `<image>`. A first
turn from "system" replaces the template's system prompt. `type` is conversation, detail or
reasoning; the spellings of the published files and questions (conv, conversation_58k, detail_23k,
detail_description, complex, complex_reasoning, complex_reasoning_77k) are mapped to these. Other
fields are not used, which the data check says; a sample with a picture in one of them is refused,
because it would not be trained as it is meant.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np

from mmalign.config import DataConfig
from mmalign.data.forms import FormError, as_llava, form_of
from mmalign.data.json_records import REPEATED, parse
from mmalign.data.sources import Source, open_source
from mmalign.data.table import Table
from mmalign.errors import SampleError, UserError, readable

_TYPES = {
    "conv": "conversation",
    "conversation_58k": "conversation",
    "detail_23k": "detail",
    "detail_description": "detail",
    "complex": "reasoning",
    "complex_reasoning": "reasoning",
    "complex_reasoning_77k": "reasoning",
}
_FIELDS = {"id", "image", "type", "conversations", REPEATED}
_TURN_FIELDS = {"from", "value", REPEATED}
_MOST_ID_CHARACTERS = 100  # of an id that is a sample's name as it is
# a field that holds a picture, by its name or by what is in it
_IMAGE_FIELD = re.compile(
    r"(?i)(.*_)?(image|img|picture|photo|video)s?(_?(path|file|name|url|base64|bytes|data)s?)?"
)
_IMAGE_VALUE = re.compile(
    r"(?is)data:image/.*|\S+\.(jpe?g|png|webp|gif|bmp|tiff?)|.+\.(parquet|arrow)#\d+/.+"
)


@dataclass(frozen=True, slots=True)
class Turn:
    speaker: Literal["human", "gpt", "system"]  # the first one alone may be the system's
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    conversations: tuple[Turn, ...]
    images: tuple[str, ...]  # paths, in the order of their <image>
    type: str | None
    other_image: str | None = None  # a field beside `image` that holds a picture too


class Samples(Sequence[Sample]):
    """The samples of a data file or of a mix, each parsed when it is used.

    Indexing raises SampleError for a sample that follows none of the forms.
    """

    fingerprint: str  # of everything that decides which samples these are
    unused: Mapping[str, int]  # fields that nothing reads, and in how many samples they are
    forms: Mapping[str, int]  # LLaVA, ShareGPT, messages, and how many samples follow each
    container: str  # how they are written, for people
    tables: Mapping[str, Table]  # files with pictures inside, by their names

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._sample(range(len(self))[index])

    def record(self, index: int) -> dict:
        """The sample's JSON, as the file has it."""
        raise NotImplementedError

    def epoch(self, kept: np.ndarray) -> np.ndarray:
        """Rows of `kept`, the indices of the usable samples, as often as an epoch has each."""
        return np.arange(len(kept))

    def _sample(self, index: int) -> Sample:
        raise NotImplementedError


class SampleFile(Samples):
    """The selected samples of one file as a single block of bytes and offsets into it.

    A list of 595k parsed samples would take gigabytes, and a copy in every worker process.
    """

    def __init__(
        self,
        content: bytes,
        ends: np.ndarray,
        numbers: np.ndarray,
        fingerprint: str,
        unused: Mapping[str, int],
        forms: Mapping[str, int],
        source: Source,
    ):
        self._content = content  # the samples' JSON, one after the other, UTF-8
        self._ends = ends  # (num_samples,) int64; end of each in content
        # (num_samples,) int64; position in the file, or -1 - position if it is part of the name
        self._numbers = numbers
        self.fingerprint, self.unused, self.forms = fingerprint, unused, forms
        self.container, self.tables = source.container, source.tables

    def __len__(self) -> int:
        return len(self._ends)

    def record(self, index: int) -> dict:
        begin = self._ends[index - 1] if index else 0
        return parse(self._content[begin : self._ends[index]])

    def _sample(self, index: int) -> Sample:
        record, number = self.record(index), int(self._numbers[index])
        return parse_sample(
            record, str(record["id"]) if number >= 0 else _name(record, -1 - number)
        )


def read_samples(path: str | Path, data: DataConfig) -> SampleFile:
    """Read a data file; keep the samples selected by data.types and num_samples.

    A sample's name is its id; " #" and its position in the file are added to a missing, repeated,
    long or unprintable one, so that no two samples have the same name.

    Raises:
        UserError: no such file, malformed JSON (with line and column), nothing selected.
    """
    path, source = Path(path), open_source(Path(path))
    wanted = {_TYPES.get(name, name) for name in data.types}
    limit = math.inf if data.num_samples is None else data.num_samples
    content, ends, numbers, seen_ids = bytearray(), [], [], set()
    seen_types, unused, forms = Counter(), Counter(), Counter()
    for number, (text, record) in enumerate(source.rows):
        kind = type_of(record)
        seen_types[kind] += 1
        sample_id = id_of(record)
        usable_id = _is_name(sample_id) and sample_id not in seen_ids
        seen_ids.add(sample_id)
        if wanted and kind not in wanted:
            continue
        unused.update(unused_fields(record))
        forms[form_of(record)] += 1
        content += text
        ends.append(len(content))
        numbers.append(number if usable_id else -1 - number)
        if len(ends) == limit:
            break
    if not ends or wanted - set(seen_types) and len(ends) < limit:
        raise UserError(_nothing_selected(path, wanted, seen_types))
    fingerprint = f"{source.fingerprint} {sorted(wanted)} {data.num_samples}"
    arrays = np.array(ends), np.array(numbers)
    return SampleFile(bytes(content), *arrays, fingerprint, unused, forms, source)


def id_of(record: dict) -> str | None:
    sample_id = record.get("id")
    return str(sample_id) if isinstance(sample_id, (str, int)) and sample_id != "" else None


def _is_name(sample_id: str | None) -> bool:
    """Whether the id is a name as it is; others get the sample's position, as in "a #3"."""
    return (
        sample_id is not None
        and len(sample_id) <= _MOST_ID_CHARACTERS
        and sample_id.isprintable()
        and not re.search(r"#\d+$", sample_id)
    )


def _name(record: dict, position: int) -> str:
    sample_id = id_of(record)
    if sample_id is None:
        return f"#{position}"
    return f"{readable(sample_id, _MOST_ID_CHARACTERS)} #{position}"


def type_of(record: dict) -> str | None:
    kind = record.get("type")
    return _TYPES.get(kind, kind) if isinstance(kind, str) else None


def _nothing_selected(path: Path, wanted: set[str], seen: Counter) -> str:
    if not seen:
        return f"{path} contains no samples"
    found = (
        f"{count} {readable(kind or 'without type', 50)}" for kind, count in seen.most_common(10)
    )
    missing = ", ".join(sorted(wanted - set(seen)))
    return f"{path}: no samples of type {missing} (--data.types). The file has: {', '.join(found)}"


def parse_sample(record: dict, sample_id: str) -> Sample:
    """Raises SampleError for a record that follows none of the forms."""
    try:
        record = as_llava(record)
    except FormError as error:
        raise SampleError(sample_id, str(error), "Fix or remove the sample") from error
    turns, images = record.get("conversations"), _images(record)
    problem = None
    if not isinstance(turns, list):
        name = "messages" if turns is None and "messages" in record else "conversations"
        problem = f"its {name} are {type(record.get(name)).__name__}, expected a list of turns"
        problem += f" (its fields: {', '.join(map(repr, record))})" if turns is None else ""
    elif not all(isinstance(turn, dict) for turn in turns):
        problem = "a turn is not an object with from and value"
    elif twice := [x[REPEATED] for x in (record, *turns) if REPEATED in x]:
        problem = f"the key {twice[0]!r} stands twice in it"
    elif odd := _without_text(turns):
        problem = odd
    elif not all(isinstance(image, str) and image for image in images):
        problem = f"its image is {record['image']!r}, expected a path or a list of paths"
    elif not all(map(_is_text, (*(turn["value"] for turn in turns), *images))):
        problem = "its text is not Unicode: half of a surrogate pair, such as \\ud83d, stands alone"
    if problem:
        raise SampleError(sample_id, problem, "Fix the sample or remove it from the file")
    conversations = tuple(Turn(turn["from"], turn["value"]) for turn in record["conversations"])
    if conversations and conversations[0].speaker == "system" and not conversations[0].text.strip():
        conversations = conversations[1:]  # as an empty field is no system prompt
    return Sample(sample_id, conversations, images, type_of(record), _other_image(record))


def _without_text(turns: list[dict]) -> str | None:
    for number, turn in enumerate(turns, start=1):
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                return f"{key} of turn {number} is {type(turn.get(key)).__name__}, expected text"
    return None


def _images(record: dict) -> tuple:
    image = record.get("image")
    if image is None:
        return ()
    return tuple(image) if isinstance(image, list) else (image,)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unused_fields(record: dict) -> Iterator[str]:
    """The fields of a sample and of its turns that nothing reads."""
    try:
        record = as_llava(record)
    except FormError:  # the sample is refused when it is used
        return
    yield from record.keys() - _FIELDS
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            yield from (f"conversations.{name}" for name in turn.keys() - _TURN_FIELDS)


def _other_image(record: dict) -> str | None:
    """The first field with a picture that is not read: another one than those of `image`."""
    read = {Path(image).name for image in _images(record)}
    for place, known in ((record, _FIELDS), *((t, _TURN_FIELDS) for t in record["conversations"])):
        for name, value in place.items():
            pictures = () if name in known else _pictures(name, value)
            if any(Path(x).name not in read for x in pictures):
                return name
    return None


def _pictures(name: str, value: object) -> list[str]:
    """What is in a field that holds pictures by its name, or paths of pictures in another."""
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if entry]
    if _IMAGE_FIELD.fullmatch(name):
        return [str(entry) for entry in entries if isinstance(entry, (str, dict))]
    inside = [x for x in entries if isinstance(x, dict)]
    found = [x for entry in inside for key, y in entry.items() for x in _pictures(key, y)]
    return found + [x for x in entries if isinstance(x, str) and _IMAGE_VALUE.fullmatch(x)]
