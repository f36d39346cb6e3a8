"""Fixtures shared by all tests."""

import os
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs and recorded outputs of reference code; not part of the repository."""
    folder = Path(os.environ.get("MMALIGN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: comparisons with real data and recorded outputs")
    return folder
