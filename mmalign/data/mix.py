"""A mix of data files: --data.path mix.toml.

    seed = 0                              # of what is drawn; 0 where it is left out

    [files.instruct]                      # a name, with which the names of its samples begin
    path = "llava_instruct_80k.json"      # beside mix.toml, or absolute; any data file
    weight = 2                            # how often an epoch has each sample; 1 if left out

    [files.captions]
    path = "chat.json"
    samples = 50_000                      # at most so many, drawn once
    weight = 0.5                          # and of these the half

Of a weight that is not whole, the rest gives one more to as many samples, drawn once. What is drawn
of a file does not depend on the others. The files share --data.image-root.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from mmalign.config import DataConfig
from mmalign.data.forms import form_of
from mmalign.data.samples import Sample, SampleFile, Samples, read_samples, unused_fields
from mmalign.data.sources import source_files
from mmalign.data.tables import is_tables, read_tables
from mmalign.errors import SampleError, UserError
from mmalign.files import Settings, read_toml, write_text

SUFFIX = ".toml"
_MOST_WEIGHT, _MOST_SAMPLES = 1000, 10**9
_KEYS = {"path", "weight", "samples"}


@dataclass(frozen=True)
class Part:
    """One file of a mix."""

    name: str
    path: Path
    weight: float
    num_samples: int | None  # at most
    seed: int


class Mix(Samples):
    """The samples of several files, one after the other; each once, whatever its weight."""

    def __init__(self, parts: list[Part], files: list[SampleFile], about: str):
        self.parts, self.files = parts, files
        self._chosen = [_chosen(part, len(file)) for part, file in zip(parts, files, strict=True)]
        self._ends = np.cumsum([len(x) for x in self._chosen])  # (num_parts,)
        facts = [about, *(file.fingerprint for file in files)]
        self.fingerprint = json.dumps(facts)
        counted = [_counted(file, x) for file, x in zip(files, self._chosen, strict=True)]
        self.unused = sum((Counter(unused) for unused, _ in counted), Counter())
        self.forms = sum((Counter(forms) for _, forms in counted), Counter())
        self.container = f"a mix of {len(files)} files"
        named = zip(parts, files, strict=True)
        self.tables = {
            f"{x.name}/{name}": table for x, y in named for name, table in y.tables.items()
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> dict:
        number, row = self.place(index)
        return self.files[number].record(row)

    def place(self, index: int) -> tuple[int, int]:
        """Which file, and which of its samples."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        return number, int(self._chosen[number][index - first])

    def _sample(self, index: int) -> Sample:
        number, row = self.place(index)
        file, name = self.files[number], self.parts[number].name
        try:
            sample = file[row]
        except SampleError as error:
            named = f"{name}/{error.sample_id}"
            raise SampleError(named, error.problem, error.remedy) from error
        inside = [x.rpartition("#")[0] in file.tables for x in sample.images]
        images = (f"{name}/{x}" if y else x for x, y in zip(sample.images, inside, strict=True))
        return replace(sample, id=f"{name}/{sample.id}", images=tuple(images))

    def summary(self, kept: np.ndarray) -> list[dict]:
        """Of each file, how many samples are chosen and usable, and how often an epoch has one."""
        numbers = np.searchsorted(self._ends, kept, side="right")
        usable, in_epoch = (
            np.bincount(x, minlength=len(self.parts)).tolist()
            for x in (numbers, numbers[self.epoch(kept)])
        )
        return [
            {
                "name": part.name, "path": str(part.path), "weight": part.weight,
                "in_file": len(file), "samples": len(chosen), "usable": x, "in_epoch": y,
            }
            for part, file, chosen, x, y in zip(
                self.parts, self.files, self._chosen, usable, in_epoch, strict=True
            )
        ]  # fmt: skip

    def epoch(self, kept: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self._ends, kept, side="right")
        times = np.zeros(len(kept), np.int64)
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(numbers == number)
            whole = math.floor(part.weight)
            times[places] = whole
            drawn = _random(part, "weight").permutation(len(places))
            times[places[drawn[: round((part.weight - whole) * len(places))]]] += 1
            if part.weight and len(places) and not times[places].any():
                raise UserError(
                    f"an epoch has none of the {len(places):,} usable samples of files.{part.name} "
                    f"with weight {part.weight:g}. Raise it, or write 0 to leave the file out"
                )
        if not times.any():
            raise UserError("the weights of the mix leave no sample. Raise one of them")
        return np.repeat(np.arange(len(times)), times)


def open_samples(path: str | Path, data: DataConfig) -> Samples:
    """The samples of a data file, or of a mix.

    Raises UserError as read_samples, and for what is wrong with the mix.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        return read_samples(path, data)
    if data.num_samples is not None:
        raise UserError(
            f"--data.num-samples does not say of which file of {path}. Write samples into its table"
        )
    parts = read_mix(path)
    return Mix(parts, [read_samples(part.path, data) for part in parts], repr(_identity(parts)))


def has_tables(path: Path) -> bool:
    """Whether a data file, or one of a mix, may have pictures inside."""
    is_mix = path.suffix == SUFFIX and path.is_file()
    return any(is_tables(x.path) for x in read_mix(path)) if is_mix else is_tables(path)


def picture_tables(path: Path) -> dict[str, Path]:
    """The tables of a data file or mix that have pictures inside, by the names of open_samples."""
    is_mix = path.suffix == SUFFIX
    named = [(f"{x.name}/", x.path) for x in read_mix(path)] if is_mix else [("", path)]
    files = [(name, read_tables(x)[3]) for name, x in named if is_tables(x)]
    return {f"{name}{x}": table.path for name, tables in files for x, table in tables.items()}


def write_mix(path: Path, parts: list[Part]) -> None:
    """Of files beside it, all of whose samples are used."""
    tables = [f'[files.{x.name}]\npath = "{x.path.name}"\nweight = {x.weight}\n' for x in parts]
    write_text(path, f"seed = {parts[0].seed}\n\n" + "\n".join(tables))


def data_files(path: Path) -> list[tuple[str, Path]]:
    """Every file that open_samples reads, and its name in the folder or mix; empty: the path."""
    if path.suffix != SUFFIX:
        return source_files(path)
    parts = read_mix(path)
    inside = [(f"{x.name}/{name}", file) for x in parts for name, file in source_files(x.path)]
    return [("", path), *inside]


def read_mix(path: Path) -> list[Part]:
    """Raises UserError for a table, key or value that is not one of a mix."""
    tables = read_toml(path)
    top = Settings(tables, path)
    if unknown := sorted(tables.keys() - {"seed", "files"}):
        raise UserError(f"{path}: unknown key {unknown[0]!r}; known are seed and files")
    seed = top.integer("seed", 0, 2**32 - 1, 0)
    files = top.section("files")
    if not files.values:
        raise UserError(f"{path}: no files. Write a table [files.NAME] with a path for each")
    return [_part(name, files.section(name), path, seed) for name in files.values]


def _part(name: str, table: Settings, path: Path, seed: int) -> Part:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"{path}: files.{name!r}: expected a name of letters, digits, _ and -")
    if unknown := sorted(table.values.keys() - _KEYS):
        known = ", ".join(sorted(_KEYS))
        raise UserError(f"{path}: unknown key {table.within}{unknown[0]}; known are {known}")
    if not isinstance(table.get("path"), str) or not table.get("path"):
        raise table.error("path", "the path of a data file")
    location = path.parent / table.get("path")
    if location.suffix == SUFFIX:
        raise table.error("path", "a data file, not another mix")
    weight = table.number("weight", 0, _MOST_WEIGHT, 1.0)
    wanted = table.integer("samples", 1, _MOST_SAMPLES, _MOST_SAMPLES)
    return Part(name, location, weight, wanted if "samples" in table else None, seed)


def _identity(parts: list[Part]) -> list[tuple]:
    return [(x.name, x.weight, x.num_samples, x.seed) for x in parts]


def _chosen(part: Part, num_samples: int) -> np.ndarray:
    """Indices of the file's samples, in its order: (num_chosen,)."""
    if part.num_samples is None or part.num_samples >= num_samples:
        return np.arange(num_samples)
    return np.sort(_random(part, "samples").permutation(num_samples)[: part.num_samples])


def _counted(file: SampleFile, chosen: np.ndarray) -> tuple[Mapping, Mapping]:
    """Unused fields and forms of the chosen samples."""
    if len(chosen) == len(file):
        return file.unused, file.forms
    records = [file.record(int(i)) for i in chosen]
    return Counter(x for y in records for x in unused_fields(y)), Counter(map(form_of, records))


def _random(part: Part, what: str) -> np.random.RandomState:
    """Of its own for each file and purpose; numpy promises that these streams never change."""
    return np.random.RandomState([part.seed, crc32(f"{part.name} {what}".encode())])
