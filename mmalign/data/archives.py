"""Zip and tar archives of pictures."""

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mmalign.data.archive import (
    CUT,
    DEFLATED,
    ENCRYPTED,
    LINK,
    METHOD,
    SPARSE,
    SPECIAL,
    STORED,
    Archive,
    Entry,
    Member,
)
from mmalign.errors import UserError
from mmalign.files import known_kind, open_regular

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_MOST_PADDING = 2**20  # zeros behind the end mark of a tar
_EXTRA_BYTES = 256  # read beyond a member, so that its extra field does not cost a second read
_METHODS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_DOS, _UNIX = 0, 3  # what has made a zip's entry
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class ZipArchive(Archive):
    def _entries(self) -> Iterator[Entry]:
        try:
            with zipfile.ZipFile(self.path) as file:
                entries = file.infolist()
            if any(info.volume for info in entries):
                raise zipfile.BadZipFile("it is the last of several parts")
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise UserError(
                f"{self.path} is not a complete zip archive ({error}). Where a download or a copy "
                "was cut short, repeat it; of an archive in several parts, join them (zip -s 0)"
            ) from error
        for info in entries:
            mode = info.external_attr >> 16 if info.create_system == _UNIX else 0
            kind = _METHODS.get(info.compress_type, METHOD)
            kind = ENCRYPTED if info.flag_bits & 1 else LINK if stat.S_ISLNK(mode) else kind
            if not info.is_dir():
                sizes = info.compress_size, info.file_size
                yield Entry(_name_of(info), info.header_offset, *sizes, info.CRC, kind)

    def read(self, member: Member) -> bytes:
        self.check(member)
        offset, packed_size, size, crc = self._numbers[member.row].tolist()
        guess = _LOCAL_HEADER.size + len(member.name.encode()) + _EXTRA_BYTES + packed_size
        block = self.pread(guess, offset)
        if len(block) < _LOCAL_HEADER.size or not block.startswith(b"PK\3\4"):
            raise self.damaged(member, "its header is not where the directory says")
        _, *lengths = _LOCAL_HEADER.unpack_from(block)
        begin = _LOCAL_HEADER.size + sum(lengths)
        packed = block[begin : begin + packed_size]
        if len(packed) < packed_size:
            packed = self.pread(packed_size, offset + begin)
        if len(packed) < packed_size:
            raise self.damaged(member, "the archive ends before it")
        content = packed
        if self._kinds[member.row] == DEFLATED:
            content = self._inflated(member, packed, size)
        if len(content) != size or zlib.crc32(content) != crc:
            raise self.damaged(member, "its checksum is not that of the directory")
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
            raise self.damaged(member, str(error)) from error
        if len(content) > size:
            raise self.damaged(member, f"it holds more than the {size:,} bytes that it declares")
        return content


class TarArchive(Archive):
    """What an incomplete one lacks is found missing where a sample wants it; `problem` says why."""

    def _entries(self) -> Iterator[Entry]:
        num_bytes = os.path.getsize(self.path)
        try:
            with tarfile.open(self.path, "r:") as file:
                while (info := file.next()) is not None:
                    # it would keep a kilobyte per member
                    file.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                    kind = _kind_of(info)
                    # a sparse one takes less than its size, and tarfile looks where it ends
                    end = info.offset_data + (0 if kind == SPARSE else info.size)
                    if info.size < 0 or end > num_bytes:
                        self.problem, kind = f"it ends within {info.name!r}", CUT
                    if not info.isdir():
                        stamp = int(info.mtime)
                        yield Entry(info.name, info.offset_data, info.size, info.size, stamp, kind)
                    if kind == CUT:
                        return
                end = file.offset
            if self.pread(tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                self.problem = f"no header at byte {end:,}, and no end mark"
            elif num_bytes - end > _MOST_PADDING or self.pread(_MOST_PADDING, end).strip(b"\0"):
                self.problem = (
                    f"more follows its end mark at byte {end:,}, which no program reads; join "
                    "archives with tar --concatenate, not with cat"
                )
        except UserError:
            raise
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            self.problem = str(error)

    def read(self, member: Member) -> bytes:
        self.check(member)
        offset, _, size, _ = self._numbers[member.row].tolist()
        content = self.pread(size, offset)
        if len(content) < size:
            raise self.damaged(member, "the archive ends before it")
        return content


def _kind_of(info: tarfile.TarInfo) -> int:
    if info.issym() or info.islnk():
        return LINK
    if info.issparse():
        return SPARSE
    return STORED if info.isreg() else SPECIAL


def open_archive(path: Path) -> Archive:
    """Raises UserError for a file that is neither zip nor plain tar, and for a damaged one."""
    with open_regular(path) as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith((b"PK\3\4", b"PK\5\6", b"PK\7\x08")):  # the last: of several parts
        return ZipArchive(path)
    with suppress(tarfile.HeaderError):  # it has a checksum, as those of all versions of tar
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        return TarArchive(path)
    for magic, (method, unpack) in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {method}, so a picture in it can only be read by "
                f"unpacking all before it. Unpack it to a plain .tar ({unpack}), which is read in "
                "place"
            )
    if zipfile.is_zipfile(path):  # by its end: something stands before it, or it is a last part
        return ZipArchive(path)
    found = known_kind(path) or "neither a folder nor a zip, tar, Parquet or Arrow file"
    raise UserError(f"{path} is {found} (--data.image-root)")


def _name_of(info: zipfile.ZipInfo) -> str:
    """Many programs write UTF-8 without the flag that says so, which Python then reads as cp437."""
    name = info.orig_filename
    if info.create_system == _DOS and "/" not in name:  # some programs of Windows write \\
        name = name.replace("\\", "/")
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name
