"""The CPU kernels of csrc/cpu: one library for each instruction set, built by CMake.

The one that PyTorch's own kernels would use here is loaded at first use.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_BUILD = (
    "To build it: with cmake and a C++ compiler, in a clone of the repository, "
    "pip install --no-build-isolation --editable ."
)


class CpuLibraryMissing(NotImplementedError):
    """The library is missing or does not load; the message says why and how to build it."""


def file_name() -> str:
    """That of this processor: avx512, avx2, or default away from x86."""
    found = torch.backends.cpu.get_cpu_capability()
    return f"libmmalign_cpu_{found.lower() if found.startswith('AVX') else 'default'}.so"


@cache
def load() -> None:
    """Register torch.ops.mmalign_cpu.*, once, from MMALIGN_CPU_LIBRARY or beside this file.

    Raises CpuLibraryMissing.
    """
    path = Path(os.environ.get("MMALIGN_CPU_LIBRARY") or Path(__file__).with_name(file_name()))
    if not path.is_file():
        raise CpuLibraryMissing(f"is not built: {path} does not exist. {_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise CpuLibraryMissing(f"does not load: {error}. Rebuild it. {_BUILD}") from error


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, and what to do; None: they can."""
    try:
        load()
    except CpuLibraryMissing as error:
        return str(error)
    return None


@cache
def operation(name: str) -> Callable:
    """mmalign_cpu::<name>. Raises CpuLibraryMissing."""
    load()
    return getattr(torch.ops.mmalign_cpu, name).default
