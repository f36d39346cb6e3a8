"""Where the pictures of samples lie: folders, archives and tables (--data.image-root).

A picture is looked up by its name in every root. A name that several roots have is an error: which
one is meant cannot be guessed. PREFIX=ROOT keeps such roots apart; it holds the names that begin
with PREFIX/, without that. FILE#ROW/COLUMN is the picture in a row of a table, which is the data
file itself or a root.
"""

import io
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from mmalign.data.archive import MAX_PICTURE_BYTES, Archive
from mmalign.data.archives import open_archive
from mmalign.data.table import Table
from mmalign.data.tables import open_table
from mmalign.errors import SampleError, UserError
from mmalign.files import open_regular

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FIX_OR_SKIP = "Fix the file or --data.image-root, or use --data.on-bad-sample skip"


class Stored(Protocol):
    """A picture inside another file; str() says which."""

    def check(self) -> None:
        """Raises UserError where it is known without reading that `read` would."""
        ...

    def read(self) -> bytes: ...


Picture = Path | Stored


@contextmanager
def open_picture(picture: Picture) -> Iterator[BinaryIO]:
    """Its file, or its bytes as a file; UserError for one that is too large or no regular file."""
    if not isinstance(picture, Path):
        yield io.BytesIO(picture.read())
        return
    with open_regular(picture) as file:
        if (num_bytes := os.fstat(file.fileno()).st_size) > MAX_PICTURE_BYTES:
            raise UserError(f"{picture} is too large ({num_bytes:,} bytes). Scale the image down")
        yield file


def check_exists(picture: Picture) -> None:
    """UserError where there is no such picture, without reading it."""
    if not isinstance(picture, Path):
        picture.check()
    elif not os.path.isfile(picture):
        raise UserError(f"no file {picture}")


class UnreadableRootError(SampleError):
    """The sample's picture may lie in a root of which nothing can be read."""


class _OutsideError(Exception):
    """A name leads out of the root."""


@dataclass(frozen=True)
class _Unreadable:
    """A file that is not an archive, or a damaged one."""

    path: str
    error: UserError

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class _Root:
    prefix: str  # of the names that it holds, with / at its end; empty: of all
    place: str | Archive | _Unreadable  # a folder, resolved

    def __str__(self) -> str:
        return f"{self.prefix[:-1]}={self.place}" if self.prefix else str(self.place)

    def find(self, name: str, resolve, may_be_absent: bool) -> Picture | None:
        if not name.startswith(self.prefix) or isinstance(self.place, _Unreadable):
            return None
        name = name[len(self.prefix) :]
        if isinstance(self.place, Archive):
            name = posixpath.normpath(name)
            if name == ".." or name.startswith(("/", "../")):
                raise _OutsideError
            return self.place.find(name)
        path = resolve(os.path.join(self.place, name))
        if os.path.commonpath([path, self.place]) != self.place:
            raise _OutsideError
        return Path(path) if may_be_absent or os.path.exists(path) else None


def split_root(root: str) -> tuple[str, str]:
    """The prefix of the names, with / at its end, and the path; what exists as a path is one."""
    prefix, is_split, path = root.partition("=")
    if not is_split or os.path.exists(root):
        return "", root
    return prefix.strip("/") + "/", path


class Pictures:
    """Finds the pictures of samples by their names; UserError for a root that does not exist."""

    def __init__(
        self, roots: Sequence[str], follow_links: bool, tables: Mapping[str, Table] | None = None
    ):
        """tables: data files with pictures in them, by the names that theirs begin with."""
        # links in a path are resolved and have to stay inside, unless the user follows them
        self._resolve = os.path.abspath if follow_links else os.path.realpath
        self.tables, self.roots = dict(tables or {}), []
        self.table_files: list[tuple[str, Path]] = []  # those among the roots
        for prefix, path in map(split_root, roots if roots or tables else (".",)):
            if table := open_table(Path(path)):
                self._add(f"{prefix}{table.path.name}", table)
            else:
                self.roots.append(self._open(prefix, path))

    @property
    def archives(self) -> list[Archive]:
        return [root.place for root in self.roots if isinstance(root.place, Archive)]

    @property
    def unreadable(self) -> UserError | None:
        """Of the first root that is neither a folder nor an archive that can be read in place."""
        places = (root.place for root in self.roots)
        return next((place.error for place in places if isinstance(place, _Unreadable)), None)

    @property
    def has_folders(self) -> bool:
        return any(isinstance(root.place, str) for root in self.roots)

    @property
    def fingerprint(self) -> list[tuple[str, str]]:
        """Paths of folders, contents of archives, sizes and times of tables."""
        found = [
            (x.prefix, x.place.fingerprint if isinstance(x.place, Archive) else str(x.place))
            for x in self.roots
        ]
        stats = [(name, path.stat()) for name, path in self.table_files]
        return found + [(name, f"{x.st_size} {x.st_mtime_ns}") for name, x in stats]

    def find(self, sample_id: str, name: str) -> Picture:
        """Raises SampleError for a name that no root has, that several have, or that leaves them.

        With a folder as the only root, the file need not exist.
        """
        if name.startswith("data:") or _URL.match(name):
            kind = "a picture's data" if name.startswith("data:") else "a URL"
            raise SampleError(sample_id, f"its image {name!r} is {kind}, not a path", FIX_OR_SKIP)
        file, _, place = name.rpartition("#")
        cell = self.tables[file].find(place) if file in self.tables else None
        if cell is not None:
            return cell
        found, outside = [], False
        for root in self.roots:
            try:
                picture = root.find(name, self._resolve, len(self.roots) == 1)
            except _OutsideError:
                outside = True
            except UserError as error:
                raise SampleError(sample_id, str(error), FIX_OR_SKIP) from error
            except (OSError, ValueError) as error:  # ValueError: a null character
                problem = f"its image {name!r} is not a path ({error})"
                raise SampleError(sample_id, problem, FIX_OR_SKIP) from error
            else:
                found += [] if picture is None else [picture]
        if len(found) != 1:
            raise self._not_one(sample_id, name, found, outside)
        return found[0]

    def _not_one(
        self, sample_id: str, name: str, found: list[Picture], outside: bool
    ) -> SampleError:
        where = ", ".join([*map(str, self.roots), *(str(path) for _, path in self.table_files)])
        if found:
            problem = f"its image {name!r} is in several roots: {', '.join(map(str, found))}"
            remedy = "Leave out one of --data.image-root, or give it as PREFIX=ROOT"
            return SampleError(sample_id, problem, remedy)
        if outside:
            problem = f"its image {name!r} is outside the image root {where}"
            remedy = "Use paths relative to --data.image-root without .. "
            remedy += "(--data.follow-links True allows links that leave it)"
            return SampleError(sample_id, problem, remedy)
        for root in self.roots:
            if isinstance(root.place, _Unreadable) and name.startswith(root.prefix):
                problem = f"its image {name!r} cannot be read"
                return UnreadableRootError(sample_id, problem, str(root.place.error))
        cut = "".join(
            f" ({x.path.name} is not complete: {x.problem})" for x in self.archives if x.problem
        )
        archives = self.archives if len(self.roots) == 1 else ()
        such = "".join(f", which has such as {x.example()!r}" for x in archives)
        where = where or "the data file, and no --data.image-root is given"
        remedy = "Download or copy the archive again, or use --data.on-bad-sample skip"
        problem = f"no file {name!r} in {where}{cut or such}"
        return SampleError(sample_id, problem, remedy if cut else FIX_OR_SKIP)

    def _add(self, name: str, table: Table) -> None:
        known = self.tables.get(name)
        if known and not known.path.samefile(table.path):
            raise UserError(
                f"{known.path} and {table.path} both have pictures that are called {name}#ROW/..., "
                "so one hides the other. Give one of --data.image-root as PREFIX=ROOT"
            )
        if not known:
            self.tables[name] = table
            self.table_files.append((name, table.path))

    def _open(self, prefix: str, path: str) -> _Root:
        resolved = self._resolve(path)
        if os.path.isdir(resolved):
            return _Root(prefix, resolved)
        if not os.path.exists(resolved):
            raise UserError(
                f"the image root {resolved} is not a folder or archive (--data.image-root)"
            )
        try:
            return _Root(prefix, open_archive(Path(resolved)))
        except UserError as error:
            return _Root(prefix, _Unreadable(resolved, error))
