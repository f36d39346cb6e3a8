"""Every test here runs once for each backend, with uninitialised memory filled with NaN.

Without a CUDA device Triton's kernels run in its interpreter (tests/conftest.py), on CPU tensors.
It computes bf16 wrongly, so those tests need a GPU. The kernels of csrc/ need one always.
"""

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if not INTERPRETED:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS's products must repeat, too

from mmalign_kernels import dispatch, libraries  # noqa: E402

FAMILIES = {  # of a test file that is not named after its one family
    "test_adamw_moments": ("adamw",),
    "test_attention": ("attention", "rotary"),
    "test_dispatch": (),
    "test_registration": (
        *(
            "adamw",
            "attention",
            "attention_prefix",
            "linear_cross_entropy",
            "packing",
            "projector",
            "rms_norm",
        ),
        *("rotary", "shared_prefix", "swiglu", "target_logprobs", "vision"),
    ),
}


def _all_have(families, backend):
    return families and all(find_spec(f"mmalign_kernels.{x}_{backend}") for x in families)


def pytest_generate_tests(metafunc):
    name = metafunc.module.__name__.rpartition(".")[2]
    families = FAMILIES.get(name, (name.removeprefix("test_"),))
    backends = ["reference"]
    if _all_have(families, "triton"):
        backends.append(pytest.param("triton", marks=() if INTERPRETED else pytest.mark.gpu))
    if _all_have(families, "cuda"):
        backends.append(pytest.param("cuda", marks=pytest.mark.gpu))
    if any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize")):
        return
    if "backend" in metafunc.fixturenames and name != "test_codegen":
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture(autouse=True)
def backend(request):
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if request.param == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 wrongly; runs on a GPU")
    if request.param == "cuda":
        reason = "no CUDA device" if INTERPRETED else libraries.cuda_missing()
        if reason:
            pytest.skip(f"the kernels of csrc/: {reason}")
    on_gpu = request.param != "reference" and not INTERPRETED
    with torch.device("cuda" if on_gpu else "cpu"), dispatch.use_backend(request.param):
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
