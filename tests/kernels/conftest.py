"""Every test here runs once per backend, with uninitialised memory filled with NaN.

Without a CUDA device Triton's kernels run in its interpreter (tests/conftest.py), on CPU tensors.
It computes bf16 wrongly, so bf16 tests need a GPU. The kernels of csrc/ always need one.
"""

import os
import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
# The meta device stands for a GPU, and a test ends where it needs values (test_device_of_tests.py);
# with a compute capability, launches are compiled for it (test_codegen.py).
ON_META = "MMALIGN_TESTS_ON_META" in os.environ
COMPILED_FOR = int(os.environ.get("MMALIGN_TESTS_ON_META") or 0)

from mmalign_kernels import dispatch, operation, reference  # noqa: E402
from mmalign_kernels.cpu import library as cpu_library  # noqa: E402
from mmalign_kernels.cuda import library as cuda_library  # noqa: E402
from mmalign_kernels.triton import launch  # noqa: E402

from .accuracy import results  # noqa: E402

FAMILIES = {  # of test files that are not named after one family
    "test_adamw_moments": ("adamw",),
    "test_attention": ("full_attention", "rotary_attention"),
    "test_dispatch": (),
    "test_prefix_tiles": (),
    "test_registration": tuple(
        file.stem for file in Path(reference.__path__[0]).glob("[!_]*.py") if file.stem != "linear"
    ),
}


def _all_have(families, backend):
    return families and all(find_spec(f"mmalign_kernels.{backend}.{x}") for x in families)


def pytest_generate_tests(metafunc):
    name = metafunc.module.__name__.rpartition(".")[2]
    families = FAMILIES.get(name, (name.removeprefix("test_"),))
    backends = ["reference"]
    if _all_have(families, "cpu"):
        backends.append("cpu")
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
    if request.param == "triton" and INTERPRETED and not ON_META and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 wrongly; runs on a GPU")
    if request.param == "cuda":
        reason = "no CUDA device" if INTERPRETED else cuda_library.missing()
        if reason:
            pytest.skip(f"the kernels of csrc/: {reason}")
    if request.param == "cpu" and (reason := cpu_library.missing()):
        pytest.skip(f"the kernels of csrc/cpu: {reason}")
    on_gpu = request.param not in ("reference", "cpu") and not INTERPRETED
    device = "meta" if ON_META else "cuda" if on_gpu else "cpu"
    with torch.device(device), dispatch.use_backend(request.param), _compiled():
        yield request.param


@contextmanager
def _compiled():
    """On the meta device operations launch, and what they launch is compiled and has to fit."""
    if not COMPILED_FOR:
        yield
        return
    from codegen import compiler

    gpu = compiler.DEVICES[COMPILED_FOR]
    with pytest.MonkeyPatch.context() as patch, compiler.recording(gpu) as kernels:
        patch.setattr(operation, "is_traced", lambda x: torch.compiler.is_compiling())
        patch.setattr(torch.autograd, "gradcheck", lambda call, inputs, **_: results(call, inputs))
        yield
    for kernel in kernels:
        asked = f"{kernel.metadata.name}: {kernel.metadata.shared} bytes of shared memory"
        assert kernel.metadata.shared <= gpu.shared_bytes, f"{asked} of {gpu.shared_bytes}"


@pytest.fixture
def sm_90_settings(backend):
    """Of few multiprocessors, wherever the test runs."""
    if backend != "triton":
        pytest.skip("Triton only")
    if not (INTERPRETED and not COMPILED_FOR) and not launch.gpu(torch.empty(0)).is_large:
        pytest.skip("the settings of sm_90 need its shared memory")
    from codegen.compiler import H100, pretend

    with pretend(H100._replace(num_multiprocessors=3)):
        yield


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        mixes_devices = re.search(r"on cpu\b|two .*devices", str(error))
        if mixes_devices or not ON_META:
            raise
