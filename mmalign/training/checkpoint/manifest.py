"""manifest.json of a checkpoint: every file's size and checksum, so that damage is seen."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
_CHUNK = 1 << 22


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Size in bytes and CRC-32 of each file."""
    return {name: {"bytes": size(folder / name), "crc32": crc32(folder / name)} for name in names}


def write(folder: Path, step: int, files: dict[str, dict[str, int]]) -> None:
    """On the disk before it returns. Written last: a folder without it is half-written."""
    with open(folder / NAME, "w") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        flush(file)
    flush_folder(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it."""
    try:
        files = json.loads((folder / NAME).read_text())["files"]
    except FileNotFoundError:
        return f"{NAME} is missing: it was never completely written"
    except (ValueError, KeyError, TypeError):
        return f"{NAME} cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if size(path) != expected["bytes"]:
            return f"{name} has {size(path)} bytes instead of {expected['bytes']}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 releases Python's lock
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


def flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes names in a folder (new files, a rename) as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
