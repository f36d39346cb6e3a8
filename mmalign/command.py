"""The edges of a command: how it ends, which signals it obeys, how it shows progress.

Stopped and StopSignal are what a training run does when a signal arrives; command_line ends every
script in one line.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mmalign.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_MAY_BE_EMPTY = ("--wandb", "--profile", "--prompt")  # nowhere, no step; chat says what it needs
_SECONDS_PER_LINE = 10.0  # of progress in a log file


@contextmanager
def command_line() -> Iterator[None]:
    """For the body of a script: whatever a user can cause ends it with one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.raiseExceptions = False  # a log whose reader has gone is not worth a traceback
    try:
        _refuse_empty(sys.argv[1:])
        with logging_redirect_tqdm():  # messages get lines of their own beside a bar
            yield
        sys.stdout.flush()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        sys.exit(f"error: {reason(error)}. Fix this and rerun the same command.")


def _refuse_empty(arguments: Sequence[str]) -> None:
    """UserError for an empty argument, such as of a shell's unset variable.

    As a path it would be the current folder, or as good as left out.
    """
    flag = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            flag, is_empty = name, bool(equals) and not value.strip()
        else:
            is_empty = not argument.strip()
        if is_empty and flag not in _MAY_BE_EMPTY:
            raise UserError(
                f"{flag or 'an argument'} is empty; expected a value. Leave it out, or check the "
                "variable that it comes from"
            )


def reason(error: OSError) -> str:
    """What the system could not do, and with which file: "No space left on device (FILE)"."""
    file = error.filename2 or error.filename
    return f"{error.strerror or error}{f' ({file})' if file else ''}"


def _end(kind, error, trace) -> None:
    """sys.excepthook: Ctrl-C or a broken matplotlibrc at a script's imports is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, (OSError, UnicodeDecodeError)) and _in_matplotlib(trace):
        print(f"error: {error}. Repair or remove this matplotlibrc", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _in_matplotlib(trace: TracebackType | None) -> bool:
    """Whether the error was raised while matplotlib was loaded."""
    return any(x.f_globals.get("__name__") == "matplotlib" for x, _ in walk_tb(trace))


sys.excepthook = _end
if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # as a notebook sets it
    # an unknown name keeps matplotlib from loading, and the commands' figures need no backend
    os.environ.pop("MPLBACKEND", None)


class Stopped(BaseException):
    """A signal stopped the run; everything is saved, and the same command resumes it.

    A BaseException like KeyboardInterrupt, so that `except Exception` does not catch it.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again

    def __init__(self, when: str = ""):
        super().__init__(
            f"stopped by a signal{when and ' '}{when}; everything is saved. "
            "Rerun the same command to resume."
        )


class StopSignal:
    """Inside, SIGTERM, SIGHUP, SIGUSR1 (SLURM's warning) and SIGINT stop the run.

    At once, by raising Stopped; while steps are trained, they only set `requested`. A second signal
    has its usual effect, and so has one that was ignored from the start (SIGHUP under nohup).
    """

    def __init__(self):
        self.requested = False
        self.raises = True
        self.previous: dict[int, Any] = {}  # handlers by signal

    def __enter__(self) -> "StopSignal":
        self.process = os.getpid()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    @contextmanager
    def raising(self, raises: bool) -> Iterator[None]:
        """Whether a signal inside raises Stopped at once, or only sets `requested`."""
        before, self.raises = self.raises, raises
        try:
            if raises and self.requested:
                raise Stopped()
            yield
        finally:
            self.raises = before

    def _on_signal(self, number, frame) -> None:
        if os.getpid() != self.process:  # a worker that was forked: its parent ends it
            return
        self.requested = True
        self._restore()
        if self.raises:
            raise Stopped()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def progress_bar(iterable: Iterable | None = None, **options) -> Any:
    """tqdm on a terminal; in a log a line every 10 seconds. Takes tqdm's options."""
    if options.get("disable") or sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return _ProgressLines(iterable, **options)


class _ProgressLines:
    """What we use of tqdm's interface, without carriage returns."""

    def __init__(
        self,
        iterable: Iterable | None,
        desc: str = "",
        total: int | None = None,
        initial: int = 0,
        unit: str = "it",
        leave: bool = True,
        **others,
    ):
        self.iterable, self.desc, self.unit, self.n = iterable, desc, unit.strip(), initial
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.leave, self.postfix, self.shown = leave, "", initial
        self.printed_at = time.monotonic()

    def __enter__(self) -> "_ProgressLines":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        for value in self.iterable or ():
            yield value
            self.update()
        self.close()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.printed_at >= _SECONDS_PER_LINE:
            self._print()

    def close(self) -> None:
        if self.leave and self.n != self.shown:
            self._print()

    def _print(self) -> None:
        self.printed_at, self.shown = time.monotonic(), self.n
        of = "" if self.total is None else f" of {self.total:,}"
        print(f"{self.desc}: {self.n:,}{of} {self.unit}  {self.postfix}".rstrip(), file=sys.stderr)
