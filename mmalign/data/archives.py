"""Pictures inside zip and tar archives, read in place.

The directory of an archive is read once, into arrays that worker processes share by fork: about 100
bytes per member. A picture is then one os.pread, which has no file position that processes could
move for each other. Nothing is unpacked to the disk, and no link in an archive is followed.
"""

import hashlib
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmalign.errors import UserError
from mmalign.files import open_regular

MAX_PICTURE_BYTES = 2**28  # some readers take the whole file into memory before they know its size
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_MOST = 2**63 - 1  # what a damaged directory may exceed
_EXTRA_BYTES = 256  # read beyond a member, so that its extra field does not cost a second read
_STORED, _DEFLATED, _LINK, _SPECIAL, _ENCRYPTED, _METHOD = range(6)
_PROBLEMS = {  # why a member cannot be read, what to do
    _LINK: "is a link, and none is followed. Pack the file itself (tar --dereference)",
    _SPECIAL: "is not a regular file. Pack the file itself",
    _ENCRYPTED: "is encrypted. Pack it again without a password",
    _METHOD: "is compressed in another way than deflate. Pack it again (zip -0 is best for JPEG)",
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
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
    """Base of ZipArchive and TarArchive: the directory, by name.

    A name is a member's path with / between folders, without ./ in front. Where all members lie in
    one folder, as those of COCO's train2017.zip, names inside that folder are found, too.
    """

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
            raise UserError(f"the archive {path} has no files in it. Name the one of the pictures")
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

    def _pread(self, num_bytes: int, offset: int) -> bytes:
        """Fewer bytes where the file ends before."""
        if self._descriptor is None:
            with open_regular(self.path) as file:
                if _facts(os.fstat(file.fileno())) != self._stat:
                    raise UserError(
                        f"{self.path} has changed while it was read. Rerun the same command"
                    )
                self._descriptor = os.dup(file.fileno())
        parts, left = [], num_bytes
        while left > 0:  # a read can be short
            part = os.pread(self._descriptor, left, offset + num_bytes - left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _damaged(self, member: Member, what: str) -> UserError:
        return UserError(f"{member} is damaged ({what}). Download or pack the archive again")


class ZipArchive(Archive):
    def _entries(self) -> Iterator[Entry]:
        try:
            with zipfile.ZipFile(self.path) as file:
                entries = file.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise UserError(
                f"{self.path} is not a complete zip archive ({error}). Where a download or a copy "
                "was cut short, repeat it; of an archive in several parts, join them (zip -s 0)"
            ) from error
        for info in entries:
            mode = info.external_attr >> 16 if info.create_system == 3 else 0  # 3: Unix
            kind = {zipfile.ZIP_STORED: _STORED, zipfile.ZIP_DEFLATED: _DEFLATED}.get(
                info.compress_type, _METHOD
            )
            kind = _ENCRYPTED if info.flag_bits & 1 else _LINK if stat.S_ISLNK(mode) else kind
            if not info.is_dir():
                sizes = info.compress_size, info.file_size
                yield Entry(_name_of(info), info.header_offset, *sizes, info.CRC, kind)

    def read(self, member: Member) -> bytes:
        self.check(member)
        offset, packed_size, size, crc = self._numbers[member.row].tolist()
        guess = _LOCAL_HEADER.size + len(member.name.encode()) + _EXTRA_BYTES + packed_size
        block = self._pread(guess, offset)
        if len(block) < _LOCAL_HEADER.size or not block.startswith(b"PK\3\4"):
            raise self._damaged(member, "its header is not where the directory says")
        _, *lengths = _LOCAL_HEADER.unpack_from(block)
        begin = _LOCAL_HEADER.size + sum(lengths)
        packed = block[begin : begin + packed_size]
        if len(packed) < packed_size:
            packed = self._pread(packed_size, offset + begin)
        if len(packed) < packed_size:
            raise self._damaged(member, "the archive ends before it")
        content = packed
        if self._kinds[member.row] == _DEFLATED:
            content = self._inflated(member, packed, size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise self._damaged(member, "its checksum is not that of the directory")
        return content

    def checksum(self, member: Member) -> tuple[int, int]:
        """CRC-32 and size of the file, as the directory has them."""
        _, _, size, crc = self._numbers[member.row].tolist()
        return crc, size

    def _inflated(self, member: Member, packed: bytes, size: int) -> bytes:
        """Not more than the directory declares."""
        try:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            content = inflater.decompress(packed, size + 1)
        except zlib.error as error:
            raise self._damaged(member, str(error)) from error
        if len(content) > size:
            raise self._damaged(member, f"it holds more than the {size:,} bytes that it declares")
        return content


class TarArchive(Archive):
    def _entries(self) -> Iterator[Entry]:
        num_bytes, problem = os.path.getsize(self.path), ""
        try:
            with tarfile.open(self.path, "r:") as file:
                while (info := file.next()) is not None:
                    # it would keep a kilobyte per member
                    file.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    if info.size < 0 or info.offset_data + info.size > num_bytes:
                        problem = f"the archive ends within {info.name!r}"
                        break
                    kind = _STORED if info.isreg() and not info.issparse() else _SPECIAL
                    kind = _LINK if info.issym() or info.islnk() else kind
                    if not info.isdir():
                        stamp = int(info.mtime)
                        yield Entry(info.name, info.offset_data, info.size, info.size, stamp, kind)
                end = file.offset
            if not problem and self._pread(tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                problem = f"no header at byte {end:,}, and no end mark"
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            problem = str(error)
        if problem:
            raise UserError(
                f"{self.path} is not a complete tar archive ({problem}). Where a download or a "
                "copy was cut short, repeat it"
            )

    def read(self, member: Member) -> bytes:
        self.check(member)
        offset, _, size, _ = self._numbers[member.row].tolist()
        content = self._pread(size, offset)
        if len(content) < size:
            raise self._damaged(member, "the archive ends before it")
        return content


def open_archive(path: Path) -> Archive:
    """Raises UserError for a file that is neither zip nor plain tar, and for a damaged one."""
    with open_regular(path) as file:
        start = file.read(512)
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return ZipArchive(path)
    if start[257:262] == b"ustar":
        return TarArchive(path)
    for magic, (method, unpack) in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {method}, so a picture in it can only be read by "
                f"unpacking all before it. Unpack it to a plain .tar ({unpack}), which is read in "
                "place"
            )
    raise UserError(f"{path} is neither a folder nor a zip or tar archive (--data.image-root)")


def _name_of(info: zipfile.ZipInfo) -> str:
    """Many programs write UTF-8 without the flag that says so, which Python then reads as cp437."""
    name = info.orig_filename
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _facts(of: os.stat_result) -> tuple[int, int]:
    return of.st_size, of.st_mtime_ns


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
