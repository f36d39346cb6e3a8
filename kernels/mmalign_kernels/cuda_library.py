"""The CUDA kernels of csrc/: one library, built by CMake, loaded at first use.

It is built against PyTorch's stable ABI: the same file serves PyTorch 2.11 and later, and it loads,
with its schemas and checks, where PyTorch is built for the CPU only.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).with_name("libmmalign_cuda.so")
_BUILD = (
    "To build it: with nvcc on the PATH and in a clone of the repository, "
    'MMALIGN_CUDA_ARCHS="90a" pip install --no-build-isolation --editable . '
    "(80: A100, 90a: H100 and H200, 100a: B200; without MMALIGN_CUDA_ARCHS the card that is there)"
)

_fakes: dict[str, Callable] = {}


class CudaLibraryMissing(NotImplementedError):
    """The library is not there or does not load; the message says why and how to build it."""


def fake(operation: str) -> Callable[[Callable], Callable]:
    """Declares results of mmalign_cuda::<operation> without data, for tracing."""

    def declare(function: Callable) -> Callable:
        _fakes[operation] = function
        return function

    return declare


def load(path: str | Path | None = None) -> None:
    """Registers torch.ops.mmalign_cuda.*, once; path, or MMALIGN_CUDA_LIBRARY: another file.

    Raises CudaLibraryMissing.
    """
    _load(Path(path or os.environ.get("MMALIGN_CUDA_LIBRARY") or FILE).resolve())


@cache
def _load(path: Path) -> None:
    if not path.is_file():
        raise CudaLibraryMissing(f"is not built: there is no {path}. {_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise CudaLibraryMissing(f"does not load: {error}. Build it anew. {_BUILD}") from error


@cache
def operation(name: str) -> Callable:
    """mmalign_cuda::<name>, with its fake kernel. Raises CudaLibraryMissing."""
    load()
    found = getattr(torch.ops.mmalign_cuda, name).default
    torch.library.register_fake(f"mmalign_cuda::{name}", _fakes[name])
    return found
