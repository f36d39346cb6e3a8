"""manifest.json of a checkpoint: size and checksum of every file, to detect corruption."""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmalign.errors import UserError
from mmalign.files import read_json, write_json

NAME = "manifest.json"
_CHUNK = 1 << 22


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Size in bytes and CRC-32 of each file."""
    return {name: {"bytes": size(folder / name), "crc32": crc32(folder / name)} for name in names}


def write(folder: Path, step: int, files: dict[str, dict[str, int]]) -> None:
    """On the disk before it returns. Written last: a folder without it is incomplete."""
    write_json(folder / NAME, {"step": step, "files": files})
    flush_folder(folder)


def corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it."""
    try:
        files = read_json(folder / NAME, "The checkpoint was never completely written.")["files"]
    except (UserError, KeyError) as error:
        return str(error)
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
