"""The built library under any PyTorch: loads, has its schemas and fakes, checks arguments."""

import contextlib
import subprocess
import sys
import time

import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.cuda import adamw as adamw_cuda
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import rms_norm as rms_norm_cuda
from mmalign_kernels.cuda.library import CudaLibraryMissing
from torch._subclasses.fake_tensor import FakeTensorMode

EPS = 1e-5
SETTINGS = (1, 1e-3, 0.9, 0.999, 1e-8, 0.1)


@pytest.fixture(autouse=True)
def library(cuda_library_file, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_LIBRARY", str(cuda_library_file))
    cuda_library.load()


def test_loads_beside_a_torch_without_cuda(cuda_library_file):
    """In a fresh process, and it asks for no library of CUDA's."""
    code = f"import torch; torch.ops.load_library({str(cuda_library_file)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    needed = subprocess.run(
        ["readelf", "-d", cuda_library_file], check=True, capture_output=True, text=True
    ).stdout
    assert "libtorch_cpu" in needed
    assert not [x for x in ("libcuda", "libtorch_cuda", "libc10_cuda") if x in needed]


def test_missing_library_says_how_to_build_it(tmp_path):
    with pytest.raises(
        CudaLibraryMissing, match="is not built: .*absent.so.*nvcc.*MMALIGN_CUDA_ARCHS"
    ):
        cuda_library.load(tmp_path / "absent.so")
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(CudaLibraryMissing, match="does not load.*Rebuild it"):
        cuda_library.load(broken)


def test_schemas():
    """Arguments in the order of the family's operation; what is written is marked."""
    for module, names in ((rms_norm_cuda, ("rms_norm_fwd", "rms_norm_bwd")),):
        for name in names:
            schema = getattr(torch.ops.mmalign_cuda, name).default._schema
            function = getattr(module, name)
            parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
            assert [x.name for x in schema.arguments][: len(parameters)] == list(parameters)
    schema = torch.ops.mmalign_cuda.adamw_update.default._schema
    written = [x.name for x in schema.arguments if x.alias_info and x.alias_info.is_write]
    state = ["params", "exp_avgs", "exp_avg_sqs", "remainders"]
    assert written == [*state, "exp_avg_scales", "exp_avg_sq_scales"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_fakes_promise_what_the_family_declares(dtype):
    """Shapes, types and devices without data, beside the family's own declaration."""
    with FakeTensorMode(), torch.device("cuda"):
        x, weight, rstd = (torch.empty(s, dtype=dtype) for s in ((6, 8), (8,), (6, 1)))
        rstd = rstd.to(torch.promote_types(dtype, torch.float32))
        calls = {
            "rms_norm_fwd": (x, weight, EPS),
            "add_rms_norm_fwd": (x, x, weight, EPS),
            "rms_norm_bwd": (x, x, x, weight, rstd, False),
        }
        counters = torch.empty(1024, dtype=torch.int32)
        for name, arguments in calls.items():
            declared = getattr(torch.ops.mmalign, name)(*arguments)
            extra = (counters,) if name.endswith("bwd") else ()
            found = cuda_library.operation(name)(*arguments, *extra)
            assert len(found) == len(declared)
            for ours, theirs in zip(found, declared, strict=True):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                assert ours.device == theirs.device


def rows(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


HUGE = 1 << 31  # rows of one column: 2 GiB of addresses, never touched


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("x is not on a CUDA device", {}),
        (r"x has shape \(2, 3, 8\), expected 2 dimensions", {"x": rows(2, 3, 8)}),
        ("x is Int, expected BFloat16 or Half", {"x": rows(3, 8).int()}),
        (r"x of shape \(3, 8\) is not contiguous", {"x": rows(8, 3).t()}),
        (r"weight has shape \(9,\), expected \(8,\) beside x", {"weight": rows(9)}),
        ("weight is Half, expected Float", {"weight": rows(8).half()}),
        ("weight of shape .* is not contiguous", {"weight": rows(16)[::2]}),
        (r"residual has shape \(4, 8\), expected \(3, 8\) beside x", {"residual": rows(4, 8)}),
        ("residual is BFloat16, expected Float", {"residual": rows(3, 8).bfloat16()}),
        ("residual of shape .* is not contiguous", {"residual": rows(8, 3).t()}),
    ],
)
def test_wrong_arguments_of_the_forward(words, arguments):
    whole = {"x": rows(3, 8), "residual": rows(3, 8), "weight": rows(8)} | arguments
    operation = cuda_library.operation("add_rms_norm_fwd")
    with pytest.raises(RuntimeError, match=f"add_rms_norm_fwd: {words}"):
        operation(**whole, eps=EPS)
    if "residual" not in arguments:
        whole.pop("residual")
        with pytest.raises(RuntimeError, match=f"rms_norm_fwd: {words}"):
            cuda_library.operation("rms_norm_fwd")(**whole, eps=EPS)


def test_more_rows_than_a_launch_counts():
    x = torch.empty(HUGE, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"x has 2147483648 rows, .* less than 2\^31"):
        cuda_library.operation("rms_norm_fwd")(x, rows(1).half(), EPS)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("x is not on a CUDA device", {}),
        ("x is Long", {"x": rows(3, 8).long()}),
        (r"grad_y has shape \(3, 7\)", {"grad_y": rows(3, 7)}),
        ("grad_y is Half, expected Float", {"grad_y": rows(3, 8).half()}),
        ("grad_y of shape .* is not contiguous", {"grad_y": rows(8, 3).t()}),
        (r"grad_residual has shape \(8,\)", {"grad_residual": rows(8)}),
        (r"weight has shape \(1, 8\)", {"weight": rows(1, 8)}),
        (r"rstd has shape \(3,\), expected \(3, 1\)", {"rstd": rows(3)}),
        ("rstd is BFloat16, expected Float", {"rstd": rows(3, 1).bfloat16()}),
        (r"counters has shape \(7,\), expected \(1024,\)", {"counters": rows(7).int()}),
        ("counters is Float, expected Int", {"counters": rows(1024)}),
    ],
)
def test_wrong_arguments_of_the_backward(words, arguments):
    names = ("grad_y", "grad_residual", "x")
    whole = {name: rows(3, 8) for name in names}
    whole |= {"weight": rows(8), "rstd": rows(3, 1), "counters": rows(1024).int()}
    with pytest.raises(RuntimeError, match=f"rms_norm_bwd: {words}"):
        cuda_library.operation("rms_norm_bwd")(**(whole | arguments), needs_weight=True)


LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
EMPTY = {name: [] for name in ("remainders", "exp_avg_scales", "exp_avg_sq_scales")}


@pytest.mark.parametrize(
    ("words", "lists", "seed"),
    [
        (r"params\[0\] is not on a CUDA device", {}, None),
        ("grads has 1 tensors beside 2 params", {"grads": [rows(4)]}, None),
        (r"exp_avgs\[1\] has shape \(6,\), expected \(5,\)", {"exp_avgs": [rows(4), rows(6)]}, 1),
        (r"params\[1\] is BFloat16, expected Float", {"params": [rows(4), rows(5).bfloat16()]}, 1),
        (r"grads\[0\] is Half, expected Float", {"grads": [rows(4).half(), rows(5).half()]}, 1),
        (
            r"exp_avg_sqs\[1\] of shape \(5,\) is not contiguous",
            {"exp_avg_sqs": [rows(4), rows(10)[::2]]},
            None,
        ),
        (
            r"remainders\[0\] is Int, expected Short",
            {"remainders": [rows(4).int(), rows(5).int()]},
            None,
        ),
        (
            "remainders beside fp32 params",
            {"remainders": [rows(4).short(), rows(5).short()]},
            None,
        ),
        (
            "seed is missing",
            {name: [rows(4).bfloat16(), rows(5).bfloat16()] for name in ("params", "grads")},
            None,
        ),
        (
            "exp_avg_scales has 0 tensors beside 2 params",
            {name: [rows(4).byte(), rows(5).byte()] for name in ("exp_avgs", "exp_avg_sqs")},
            1,
        ),
    ],
)
def test_wrong_arguments_of_adamw(words, lists, seed):
    whole = {name: [rows(4), rows(5)] for name in LISTS} | EMPTY | lists
    with pytest.raises(RuntimeError, match=f"adamw_update: {words}"):
        adamw_cuda.adamw_update(**whole, grad_scale=None, **_settings(), seed=seed)


def test_wrong_grad_scale_of_adamw():
    whole = {name: [rows(4)] for name in LISTS} | EMPTY
    with pytest.raises(RuntimeError, match=r"grad_scale has shape \(1,\), expected \(\)"):
        adamw_cuda.adamw_update(**whole, grad_scale=rows(1), **_settings(), seed=None)


def _shortest(run, times=20):
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def test_adamw_checks_its_tensors_faster_than_python_reads_them():
    """A launch of a LoRA takes far less than a millisecond. Texts belong to messages alone."""
    whole = {name: [rows(4) for _ in range(448)] for name in LISTS} | EMPTY
    lists = [whole[name] for name in LISTS]

    def call(**changed):
        with contextlib.suppress(RuntimeError):  # there is no GPU, and that is checked last
            adamw_cuda.adamw_update(**(whole | changed), grad_scale=None, **_settings(), seed=None)

    before_checks = _shortest(lambda: call(grads=[]))
    checks = _shortest(call) - before_checks
    reads = _shortest(lambda: [(x.dtype, x.shape, x.is_contiguous()) for y in lists for x in y])
    assert checks < 2 * reads, (checks, reads)


def _settings():
    names = ("step", "learning_rate", "beta1", "beta2", "eps", "weight_decay")
    return dict(zip(names, SETTINGS, strict=True))


def test_forced_on_the_cpu_is_an_error_that_says_so():
    with dispatch.use_backend("cuda"), pytest.raises(NotImplementedError, match="CUDA device"):
        dispatch.implementation("rms_norm_fwd", "rms_norm", "cpu")
