"""manifest.json of a checkpoint: whose it is, and size and checksum of every file."""

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmalign.errors import UserError
from mmalign.files import read_json, write_json

NAME = "manifest.json"
_CHUNK = 1 << 22


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Size in bytes and CRC-32 of each file."""
    return {name: {"bytes": size(folder / name), "crc32": crc32(folder / name)} for name in names}


def write(
    folder: Path, step: int, facts: Mapping[str, str], files: dict[str, dict[str, int]]
) -> None:
    """On the disk before it returns. Written last: a folder without it is incomplete.

    facts: what else a checkpoint has to agree in to be read, such as the run's identity.
    """
    write_json(folder / NAME, {"step": step, **facts, "files": files})
    flush_folder(folder)


def problem(folder: Path, step: int, facts: Mapping[str, str]) -> str | None:
    """What is wrong with the checkpoint of a step, "is corrupt: ...", or None. Reads all of it."""
    try:
        manifest = read_json(folder / NAME, "The checkpoint was never completely written.")
    except UserError as error:
        return f"is corrupt: {error}"
    for name, expected in {"step": step, **facts}.items():
        if manifest.get(name) != expected:
            found = f"its {NAME} says {name} {manifest.get(name)!r}, not {expected!r}"
            return f"is of another run or step: {found}"
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        return f"is corrupt: {NAME} lacks the size or the checksum of a file"
    corruption = _corruption(folder, files)
    return corruption and f"is corrupt: {corruption}"


def _is_entry(entry: tuple[str, object]) -> bool:
    """A file of the folder itself, with its size and checksum."""
    name, facts = entry
    numbers = [facts.get(key) for key in ("bytes", "crc32")] if isinstance(facts, dict) else [None]
    return Path(name).name == name and all(type(number) is int for number in numbers)


def _corruption(folder: Path, files: dict[str, dict[str, int]]) -> str | None:
    if unknown := {path.name for path in folder.iterdir()} - files.keys() - {NAME}:
        return f"{', '.join(sorted(unknown))} is not in {NAME}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if size(path) != expected["bytes"]:
            return f"{name} has {size(path)} bytes instead of {expected['bytes']}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 releases the GIL
        sums = pool.map(crc32, [folder / name for name in files])
        for (name, expected), found in zip(files.items(), sums, strict=True):
            if found != expected["crc32"]:
                return f"the content of {name} has changed since it was written"
    return None


def size(path: Path) -> int:
    return path.stat().st_size


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder (new files, renames) as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
