"""The libraries of CMakeLists.txt: the host one needs a C++ compiler, the kernels need nvcc."""

import shutil
from pathlib import Path

import pytest

from csrc.build import ARCHITECTURES, build


@pytest.fixture(scope="session")
def host_library_file() -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    return build((), "mmalign_host")


@pytest.fixture(scope="session")
def cuda_library_file() -> Path:
    """For all architectures."""
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("csrc/ needs cmake and nvcc")
    return build(ARCHITECTURES, "mmalign_cuda")
