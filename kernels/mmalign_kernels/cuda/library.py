"""The CUDA kernels of csrc/: one library, built by CMake, loaded at first use.

It uses PyTorch's stable ABI: one file serves PyTorch 2.11 and later, and it loads, with schemas and
argument checks, into a CPU build of PyTorch, too.
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
    "(80: A100, 90a: H100 and H200, 100a: B200; default: the GPU of this machine)"
)

_fakes: dict[str, Callable] = {}


class CudaLibraryMissing(NotImplementedError):
    """The library is missing or does not load; the message says why and how to build it."""


def fake(operation: str, declaration: Callable) -> None:
    """Set the fake kernel of mmalign_cuda::<operation>: results without data, for tracing."""
    _fakes[operation] = declaration


def load(path: str | Path | None = None) -> None:
    """Register torch.ops.mmalign_cuda.*, once, from path, MMALIGN_CUDA_LIBRARY or FILE.

    Raises CudaLibraryMissing.
    """
    _load(Path(path or os.environ.get("MMALIGN_CUDA_LIBRARY") or FILE).resolve())


@cache
def _load(path: Path) -> None:
    if not path.is_file():
        raise CudaLibraryMissing(f"is not built: {path} does not exist. {_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise CudaLibraryMissing(f"does not load: {error}. Rebuild it. {_BUILD}") from error


def missing() -> str | None:
    """Why the kernels of csrc/ cannot run here, and what to do; None: they can."""
    try:
        load()
    except CudaLibraryMissing as error:
        return str(error)
    return None


@cache
def operation(name: str) -> Callable:
    """mmalign_cuda::<name>, with its fake kernel. Raises CudaLibraryMissing."""
    load()
    found = getattr(torch.ops.mmalign_cuda, name).default
    torch.library.register_fake(f"mmalign_cuda::{name}", _fakes[name])
    return found
