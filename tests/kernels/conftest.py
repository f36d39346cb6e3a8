"""Every test here runs once for each backend, with uninitialised memory filled with NaN."""

import pytest
import torch
from mmalign_kernels import dispatch

BACKENDS = ("reference",)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
