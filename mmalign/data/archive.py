"""An archive of pictures that is read in place; archives.py has the kinds.

The directory of an archive is read once, into arrays that worker processes share by fork: about 100
bytes per member. A picture is then one os.pread, which has no file position that processes could
move for each other. Nothing is unpacked to the disk, and no link in an archive is followed.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmalign.errors import UserError
from mmalign.files import open_regular

MAX_PICTURE_BYTES = 2**28  # some readers take the whole file into memory before they know its size
_MOST = 2**63 - 1  # what a damaged directory may exceed
STORED, DEFLATED, LINK, SPECIAL, SPARSE, ENCRYPTED, METHOD, CUT = range(8)  # kinds of members
_PROBLEMS = {  # why a member cannot be read, what to do
    LINK: "is a link, and none is followed. Pack the file itself (tar --dereference "
    "--hard-dereference, zip without -y)",
    SPECIAL: "is not a regular file. Pack the file itself",
    SPARSE: "has its holes left out. Pack it again (tar without --sparse)",
    ENCRYPTED: "is encrypted. Pack it again without a password",
    METHOD: "is compressed in another way than deflate. Pack it again (zip -0 is best for JPEG)",
    CUT: "is cut short: the archive ends within it. Download or copy the archive again",
}
_SKIPPED = "__MACOSX/"  # what macOS adds to a zip: a second entry for every file


class Entry(NamedTuple):
    """A member as its archive's directory has it."""

    name: str
    offset: int  # of its data in a tar, of its local header in a zip
    packed_size: int
    size: int
    stamp: int  # CRC-32 in a zip, time of change in a tar: changes with the content
    kind: int


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    archive: "Archive"
    row: int
    name: str

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.name}"

    def check(self) -> None:
        """Raises UserError where the directory already says that `read` would."""
        self.archive.check(self)

    def read(self) -> bytes:
        """The file's bytes; UserError for a member that is damaged, too large or of no use here."""
        return self.archive.read(self)


class Archive:
    """The directory, by name.

    A name is a member's path with / between folders, without ./ in front. Where all members lie in
    one folder, as those of COCO's train2017.zip, names inside that folder are found, too.
    """

    problem = ""  # why it may have had more members than these

    def __init__(self, path: Path):
        self.path = path
        with open_regular(path) as file:
            self._stat = _facts(os.fstat(file.fileno()))
        self._descriptor: int | None = None
        ends, hashes, kinds = array("q"), array("Q"), bytearray()
        numbers, names, folders = array("q"), bytearray(), set()
        for entry in self._entries():
            name = entry.name.removeprefix("./")
            if name.startswith(_SKIPPED):
                continue
            encoded = name.encode("utf-8", "surrogateescape")
            names += encoded
            ends.append(len(names))
            hashes.append(_hash(encoded))
            kinds.append(entry.kind)
            numbers.extend(min(max(x, -1), _MOST) for x in entry[1:5])
            if len(folders) < 2:
                folders.add(name.partition("/")[0] if "/" in name else "")
        if not ends:
            why = f" ({self.problem})" if self.problem else ""
            raise UserError(f"{path} has no files in it{why}. Name the archive of the pictures")
        self.folder = next(iter(folders)) if len(folders) == 1 else ""
        self._names, self._ends = bytes(names), np.array(ends)
        self._kinds = np.frombuffer(bytes(kinds), np.uint8)
        # (num_members, 4) int64: offset, packed_size, size, stamp
        self._numbers = np.array(numbers).reshape(-1, 4)
        found = np.array(hashes)
        self._rows = np.argsort(found, kind="stable")  # (num_members,) of rising hashes
        self._hashes = found[self._rows]

    def __len__(self) -> int:
        return len(self._ends)

    def __str__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptor": None}  # a process that gets it pickled opens its own

    def __del__(self):
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the directory: names, sizes and what changes with the content."""
        digest = hashlib.sha256(self._names)
        for fact in (self._ends, self._numbers[:, 2:], self._kinds):
            digest.update(fact.tobytes())
        return digest.hexdigest()

    def find(self, name: str) -> Member | None:
        """Raises UserError where the archive has two files of this name."""
        for full in (name, f"{self.folder}/{name}") if self.folder else (name,):
            rows = self._rows_of(full)
            if len(rows) > 1:
                raise UserError(
                    f"{self.path} has {len(rows)} files of the name {full!r}. Pack it again with "
                    "one of them"
                )
            if rows:
                return Member(self, rows[0], full)
        return None

    def example(self) -> str:
        """The name of its first member, for messages."""
        return self._encoded_name(0).decode("utf-8", "surrogateescape")

    def check(self, member: Member) -> None:
        kind = int(self._kinds[member.row])
        if kind in _PROBLEMS:
            raise UserError(f"{member} {_PROBLEMS[kind]}")
        _, packed_size, size, _ = self._numbers[member.row].tolist()
        if max(size, packed_size) > MAX_PICTURE_BYTES:
            raise UserError(f"{member} is too large ({size:,} bytes). Scale the image down")

    def read(self, member: Member) -> bytes:
        raise NotImplementedError

    def _entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def _rows_of(self, name: str) -> list[int]:
        encoded = name.encode("utf-8", "surrogateescape")
        wanted = np.uint64(_hash(encoded))
        first = int(np.searchsorted(self._hashes, wanted))
        rows = []
        for place in range(first, len(self._hashes)):
            if self._hashes[place] != wanted:
                break
            row = int(self._rows[place])
            if self._encoded_name(row) == encoded:
                rows.append(row)
        return rows

    def _encoded_name(self, row: int) -> bytes:
        return self._names[self._ends[row - 1] if row else 0 : self._ends[row]]

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Fewer bytes where the file ends before."""
        if self._descriptor is None:
            with open_regular(self.path) as file:
                if _facts(os.fstat(file.fileno())) != self._stat:
                    raise UserError(
                        f"{self.path} has changed while it was read. Rerun the same command"
                    )
                self._descriptor = os.dup(file.fileno())
        parts, left = [], num_bytes
        while left > 0 and offset >= 0:  # a read can be short, and a damaged offset negative
            part = os.pread(self._descriptor, left, offset + num_bytes - left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def damaged(self, member: Member, what: str) -> UserError:
        return UserError(f"{member} is damaged ({what}). Download or pack the archive again")


def _facts(of: os.stat_result) -> tuple[int, int]:
    return of.st_size, of.st_mtime_ns


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
