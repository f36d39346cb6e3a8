"""What tests/kernels does not reach: widths, far rows, tables, 8-bit state. Needs a GPU."""

import numpy as np
import pytest
import torch
from mmalign_kernels import add_rms_norm, dispatch, rms_norm
from mmalign_kernels.adamw import split_master
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import rms_norm as rms_norm_cuda
from mmalign_kernels.cuda.adamw import adamw_update
from mmalign_kernels.cuda.library import operation

from tests.kernels.accuracy import assert_same_bits, compare
from tests.kernels.test_rms_norm import hugging_face_add_norm, hugging_face_norm

from .host_library import HostLibrary
from .test_host_arithmetic import SETTINGS, small_floats

pytestmark = pytest.mark.gpu
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_gpu():
    reason = cuda_library.missing() if torch.cuda.is_available() else "no CUDA device"
    if reason:
        pytest.skip(f"the kernels of csrc/: {reason}")
    torch.manual_seed(0)
    with torch.device("cuda"), dispatch.use_backend("cuda"):
        yield


def norm(x, weight):
    return rms_norm(x, weight, EPS)


def add_norm(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("columns", (1, 17, 1024, 2048, 3200, 4096, 5120, 8192, 8193, 16384, 20480))
def test_every_width(columns, dtype):
    inputs = [torch.randn(301, columns, requires_grad=True) for _ in range(2)]
    weight = (1 + torch.randn(columns) / 4).requires_grad_()
    compare(norm, hugging_face_norm, (inputs[0], weight), dtype)
    compare(add_norm, hugging_face_add_norm, (*inputs, weight), dtype)


@pytest.mark.parametrize("columns", (1024, 4096, 4097))
def test_same_bits_and_counters_back_at_zero(columns):
    inputs = [torch.randn(4099, columns, requires_grad=True) for _ in range(2)]
    assert_same_bits(add_norm, (*inputs, torch.randn(columns, requires_grad=True)))
    assert not rms_norm_cuda._counters(inputs[0].device).any()


def test_a_row_that_starts_anywhere():
    memory = torch.randn(1 + 199 * 3200)
    x, weight = memory[1:].view(199, 3200), torch.randn(3200)
    torch.testing.assert_close(norm(x, weight), norm(x.clone(), weight), rtol=1e-6, atol=1e-6)


def test_rows_past_2_31_elements():
    num_rows, columns = (1 << 31) // 4096 + 3, 4096
    x = torch.randn(num_rows, columns, dtype=torch.bfloat16)
    weight = torch.randn(columns, dtype=torch.bfloat16)
    y, rstd = rms_norm_cuda.rms_norm_fwd(x, weight, EPS)
    last = x[-7:].clone()
    y_last, rstd_last = rms_norm_cuda.rms_norm_fwd(last, weight, EPS)
    assert torch.equal(y[-7:], y_last) and torch.equal(rstd[-7:], rstd_last)
    grad, _ = rms_norm_cuda.rms_norm_bwd(x, None, x, weight, rstd, False)
    grad_last, _ = rms_norm_cuda.rms_norm_bwd(last, None, last, weight, rstd_last, False)
    assert torch.equal(grad[-7:], grad_last)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).cpu().numpy().view(np.uint16).copy()


@pytest.mark.parametrize("kind", ("fp32", "split", "rounded"))
def test_adamw_is_the_hosts_bit_for_bit(host_library_file, kind):
    """Against NumPy's bits, through the host library: more tensors than a table, ragged ends, and
    a tensor that does not start at 16 bytes."""
    host, count, seed = HostLibrary(host_library_file), 3, 7 << 33 | 12345
    masters = [torch.randn(n) for n in [1, 5, 2048, 5000, *range(100, 145), 4100]]
    grads = [torch.randn_like(x) for x in masters]
    moments = [[torch.rand_like(x) for x in masters] for _ in range(2)]
    expected = []
    for place, (master, grad) in enumerate(zip(masters, grads, strict=True)):
        weight, remainder = split_master(master)
        stored = [master.cpu().numpy().copy(), bits(weight), remainder.cpu().numpy().copy()]
        kept = {"fp32": (0,), "split": (1, 2), "rounded": (1,)}[kind]
        given = [x if i in kept else None for i, x in enumerate(stored)]
        state = [m[place].cpu().numpy().copy() for m in moments]
        arrays = (grad.cpu().numpy(), *state, len(master))
        host.adamw(*given, *arrays, 0.7, count, *SETTINGS, seed, place)
        expected.append((*stored, *state))
    split = [split_master(x) for x in masters]
    params = [x.clone() for x in masters] if kind == "fp32" else [weight for weight, _ in split]
    remainders = [remainder for _, remainder in split] if kind == "split" else []
    params[-1] = torch.cat((params[-1][:1], params[-1]))[1:]
    scale = torch.tensor(0.7)
    adamw_update(params, grads, *moments, remainders, [], [], scale, count, *SETTINGS, seed)
    for i, (master, weight, remainder, *state) in enumerate(expected):
        if kind == "fp32":
            assert (params[i].cpu().numpy() == master).all()
        else:
            assert (bits(params[i]) == weight).all()
        if kind == "split":
            assert (remainders[i].cpu().numpy() == remainder).all()
        for found, wanted in zip(moments, state, strict=True):
            assert (found[i].cpu().numpy() == wanted).all()


@pytest.mark.parametrize("factor", (0.0, torch.nan))
def test_a_skipped_step_changes_nothing(factor):
    params, grads, *moments = ([torch.rand(n) for n in (5, 4096)] for _ in range(4))
    before = [x.clone() for x in (*params, *moments[0], *moments[1])]
    adamw_update(params, grads, *moments, [], [], [], torch.tensor(factor), 2, *SETTINGS, None)
    for x, old in zip((*params, *moments[0], *moments[1]), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("moment", (torch.bfloat16, torch.uint8))
def test_small_moments_lie_beside_the_fp32_ones(moment):
    """After a step from zero state: within a code, and right in the mean."""
    num = 100_000
    grads = [torch.randn(num)]
    runs = {}
    for dtype in (torch.float32, moment):
        params, state = [torch.zeros(num)], [[torch.zeros(num, dtype=dtype)] for _ in range(2)]
        blocks = -(-num // 128) if dtype == torch.uint8 else 0
        scales = [[torch.zeros(blocks)] if blocks else [] for _ in range(2)]
        call = (params, grads, *state, [], *scales, None, 1, *SETTINGS, 5)
        operation("adamw_update")(*call)
        runs[dtype] = (params[0], [x[0] for x in state], [x[0] if x else None for x in scales])
    assert torch.equal(runs[torch.float32][0], runs[moment][0])  # the step itself is fp32's
    for i, exponent_bits in enumerate((4, 5)):
        exact, stored = runs[torch.float32][1][i], runs[moment][1][i]
        values = stored.float()
        if moment == torch.uint8:
            codes = stored.long() & (127 if i == 0 else 255)
            sizes = torch.tensor(small_floats(exponent_bits, 3), dtype=torch.float32)[codes]
            sign = 1 - 2 * (stored >> 7).float() if i == 0 else 1
            values = sign * sizes * runs[moment][2][i].repeat_interleave(128)[:num]
        near = exact.abs() > exact.abs().max() / 1000
        step = 2**-7 if moment == torch.bfloat16 else 2**-3
        assert ((values - exact).abs()[near] <= step * 1.01 * exact.abs()[near]).all()
        assert (values.double().abs().mean() / exact.double().abs().mean() - 1).abs() < 2e-3
