"""The parts of bench/gpu.py: what each runs, and how long it may take."""

import os
import sys
from dataclasses import dataclass, replace

LIMITS = {False: 450, True: 225}  # seconds in all, by --more; starting and ending take some more
TESTS = ("tests/kernels", "tests/csrc", "tests/model", "tests/training")
SANITIZER = ("compute-sanitizer", "--target-processes", "all", "--error-exitcode", "86")
# no -q: pyproject.toml has one, and with two pytest ends without a line that counts tests
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Part:
    """command: without the interpreter; None: bench.gpu_work measures it, item by item."""

    name: str
    expected: float  # seconds on an H200, and of
    most: float  # before it is stopped
    command: tuple[str, ...] | None = None
    behind: bool = False  # runs beside the next parts, up to one that needs it
    needs: tuple[str, ...] = ()  # parts that end first


def parts(more: bool, rehearsal: bool) -> list[Part]:
    """In the order in which they run: what says most first."""
    if more:
        chosen = [
            Part("sanitizer memcheck", 35, 50, _sanitize("memcheck")),
            Part("sanitizer racecheck", 35, 50, _sanitize("racecheck")),
            Part("recompute", 45, 60),
            Part("prefix", 35, 50),
            Part("shapes", 70, 90),
        ]
    else:
        workers = ("-n", str(max(len(os.sched_getaffinity(0)) - 2, 1)))
        chosen = [
            Part("build", 45, 110, ("setup.py", "build_ext", "--inplace"), behind=True),
            Part("compile", 45, 110, behind=True),
            Part("peaks", 20, 45),
            Part("kernels", 120, 165, needs=("build", "compile")),
            Part("finetune", 40, 70),
            Part("pretrain", 45, 70),
            Part("scoring", 55, 80),
            Part("tests", 85, 120, (*PYTEST, *TESTS, "-m", "gpu", *workers), needs=("build",)),
        ]
    if rehearsal:
        chosen = [_rehearsed(part) for part in chosen if "sanitizer" not in part.name]
    return chosen


def _sanitize(tool: str) -> tuple[str, ...]:
    return (*SANITIZER, "--tool", tool, sys.executable, "-m", "tests.csrc.sanitize")


def _rehearsed(part: Part) -> Part:
    """With other times, and a command that needs no GPU."""
    commands = {
        "build": ("-m", "mmalign_kernels"),
        "tests": (*PYTEST, "tests/kernels/test_swiglu.py", "-k", "triton"),
    }
    return replace(part, command=commands.get(part.name), expected=60, most=300)
