"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

if "MMALIGN_TESTS_ON_META" in os.environ:
    os.environ.pop("TRITON_INTERPRET", None)  # Triton compiles (tests/kernels/conftest.py)
elif not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; read once, when anything first imports triton
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # tests of bits need cuBLAS deterministic

REPOSITORY = Path(__file__).resolve().parents[1]


def is_asked_for(config: pytest.Config, marker: str) -> bool:
    """Whether this is pytest -m MARKER, for which the marked tests try more than by default."""
    return config.option.markexpr == marker


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """A hang inside is a failed test."""

    def expired(number, frame):
        raise AssertionError(f"not over after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def num_moments(request) -> int:
    """Interruptions of each kind, of each command."""
    return 20 if is_asked_for(request.config, "kills") else 2


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs and recorded outputs of reference code; not part of the repository."""
    folder = Path(os.environ.get("MMALIGN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: comparisons with real data and recorded outputs")
    return folder


@pytest.fixture
def set_backend(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Sets MMALIGN_BACKEND as if this process had started with it."""
    from mmalign_kernels import dispatch  # not before Triton's settings above

    def set_variable(name: str) -> None:
        monkeypatch.setenv("MMALIGN_BACKEND", name)
        dispatch.environment_backend.cache_clear()

    yield set_variable
    dispatch.environment_backend.cache_clear()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: a time stamp in them would differ between pytest-xdist's processes."""
    return argname if isinstance(val, bytes) else None
