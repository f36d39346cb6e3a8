"""The tests that run on a GPU make their tensors there: found without one.

They run on the meta device, up to the first value that they look at. A tensor that was made on the
CPU, at import or in a parameter, is an error there as it would be on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
MODULES = sorted(
    file.stem
    for file in FOLDER.glob("test_*.py")
    if not file.stem.startswith(("test_codegen", "test_costs", "test_libraries", "test_device"))
)


@pytest.fixture
def backend():
    """The processes below choose it."""


def test_no_tensor_of_a_gpu_test_is_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += [str(FOLDER / f"{name}.py") for name in MODULES]
    environment = os.environ | {"MMALIGN_TESTS_ON_META": "0"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-6000:]
