"""One owner per folder: a second process that would write there is refused.

And so is what stands in the way of the files that a command writes at its end.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmalign.distributed import DistributedContext
from mmalign.errors import UserError

log = logging.getLogger("mmalign")
NAME = ".lock"
_NOT_A_FOLDER = (errno.EEXIST, errno.ENOTDIR)
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def owned(
    folder: str | Path, flag: str, ranks: DistributedContext | None = None, wait: bool = False
) -> Iterator[None]:
    """Creates the folder; inside, no other run or evaluation can own it. Called by all ranks.

    The lock is the kernel's, so it ends with the process, however that ends. Rank r holds byte r of
    folder/.lock, and who comes first needs all bytes: ranks that outlive a killed one still count.
    wait: until another process that owns it is done, instead of refusing.

    Raises:
        UserError: on all ranks; another process owns the folder, or it cannot be made.
    """
    folder, rank, problem, file = Path(folder), ranks.rank if ranks else 0, None, None
    try:
        if rank == 0:
            try:
                file = _take_all(folder, wait)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                what = "a directory" if error.errno in _NOT_A_FOLDER else "written"
                problem = f"{flag} {folder} cannot be {what}: {error.strerror}. "
                problem += "Fix this, or name another folder"
        problem = ranks.broadcast_from_main(problem) if ranks else problem
        if problem:
            raise UserError(problem)
        if rank and (folder / NAME).exists():  # check_shared names who does not see it
            file = open(folder / NAME, "r+")  # noqa: SIM115 (held while the block runs)
            _lock(file, 1, rank)
        yield
    finally:
        if file is not None:
            file.close()


def require_names(folder: str | Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """UserError where a folder has the name of a file to be written, or a file that of a folder.

    Names are patterns below `folder`. To be asked first: they are written after hours of work.
    """
    for names, kind, is_it in (
        (files, "a file", os.path.isfile),
        (folders, "a folder", os.path.isdir),
    ):
        for path in (path for name in names for path in sorted(Path(folder).glob(name))):
            if not is_it(path):
                raise UserError(
                    f"{path} is in the way: {kind} will be written under this name. Move it away, "
                    f"or name another folder than {folder}"
                )


def is_owned(folder: str | Path) -> bool:
    """Whether another process owns the folder now."""
    path = Path(folder) / NAME
    if not path.exists():
        return False
    with open(path, "r+") as file:
        try:
            _lock(file, 0, 0)
        except BlockingIOError:
            return True
    return False


def _take_all(folder: Path, wait: bool):
    """The open lock file, of which this process holds byte 0."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / NAME, "a+")  # noqa: SIM115 (the lock lives as long as it)
    try:
        _lock(file, 0, 0, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is in use by {_owner(file.read())}. Wait for it, or name another folder"
        ) from None
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
    file.flush()
    _lock(file, 0, 1, fcntl.LOCK_UN)  # the bytes from 1 on are for the other ranks
    for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    return file


def _lock(file, length: int, start: int, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> None:
    """BlockingIOError where another process holds one of the bytes; length 0: all from start on."""
    try:
        fcntl.lockf(file, operation, length, start)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning(
            "%s: this file system has no locks (%s). Make sure that no other process writes there",
            *(file.name, error.strerror),
        )


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "another process"
