"""What a control is: a transform of samples, and what it needs besides them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmalign.config import DataConfig
from mmalign.data.captions import read_captions
from mmalign.data.forms import as_llava
from mmalign.data.mix import SUFFIX
from mmalign.data.samples import Sample, Samples, id_of, parse_sample, read_samples
from mmalign.data.turns import speaker_problem
from mmalign.errors import SampleError, UserError

Records = Sequence[dict]
CountTokens = Callable[[Sample], int]  # supervised tokens of a sample
FIX = "Fix the sample or remove it from the file"


@dataclass(frozen=True)
class Source:
    """What a control may need besides the seed."""

    records: Records
    samples: Sequence[Sample]  # the same, parsed
    random: np.random.RandomState  # its streams never change, unlike default_rng's
    second: Any  # records or captions
    count_tokens: CountTokens | None
    file_name: Callable[[str], str]  # of a picture by its name: another one for those of tables


@dataclass(frozen=True)
class Controlled:
    records: list[dict]  # each in the place of one of the source, if it is not left out
    about: dict[str, Any]  # for the manifest: what was changed, left out, or achieved
    kept: Sequence[int] | None = None  # places in the source; None: all


@dataclass(frozen=True)
class Control:
    definition: str
    transform: Callable[[Source], Controlled]
    # what the second file holds: read_records or read_captions reads it
    second: Literal["records", "captions"] | None = None
    # of the run that trains on the result, in the names of the command line
    settings: Mapping[str, Any] = field(default_factory=dict)
    # name -> content of files beside the result, whose folder is then the image root
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def __call__(
        self,
        rows: Records,
        seed: int,
        second: Any = None,
        count_tokens: CountTokens | None = None,
        samples: Sequence[Sample] | None = None,
        file_name: Callable[[str], str] = str,
    ) -> Controlled:
        """second: what read_second gives; count_tokens: for length-matched; samples: rows, parsed.

        Raises SampleError for a record that does not follow the format or that the control cannot
        take, UserError where a second file is missing, not needed, or nothing is left.
        """
        if (second is None) != (self.second is None):
            needs = f"a second file with {self.second}" if self.second else "no second file"
            raise UserError(f"this control needs {needs} (control-data): {self.definition}")
        samples = parse_samples(rows) if samples is None else samples
        random = np.random.RandomState(seed)
        return self.transform(Source(rows, samples, random, second, count_tokens, file_name))

    def read_second(self, path: str | Path) -> Any:
        return read_captions(path) if self.second == "captions" else read_records(path)


def records_of(samples: Samples) -> tuple[list[dict], list[Sample]]:
    """As records in LLaVA's form, whose pictures have the names that they have here, and parsed."""
    parsed = list(samples)
    records = (as_llava(samples.record(i)) for i in range(len(parsed)))
    rows = [with_images(row, list(x.images)) for row, x in zip(records, parsed, strict=True)]
    return rows, parsed


def read_records(path: str | Path) -> list[dict]:
    """Those of a single data file."""
    if Path(path).suffix == SUFFIX:
        raise UserError(f"{path} is a mix, expected a single data file (control-data)")
    return records_of(read_samples(path, DataConfig()))[0]


def with_images(row: dict, images: list[str]) -> dict:
    """Other images in the form, a path or a list of them, that the record has."""
    if not images:
        return row
    return row | {"image": images if isinstance(row["image"], list) else images[0]}


def parse_samples(rows: Records) -> list[Sample]:
    return [parse_sample(row, id_of(row) or f"#{i}") for i, row in enumerate(rows)]


def require_pairs(sample: Sample) -> None:
    problem = speaker_problem(sample.conversations)
    if not problem and sample.conversations[0].speaker == "system":
        problem = "it has a system prompt, which this control would not keep in its place"
    if problem:
        raise SampleError(sample.id, problem, FIX)
