"""The headers that kernels and host share, compiled for the host, against NumPy and Triton."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mmalign_kernels.adamw import FIRST, SECOND, join_master, split_master
from mmalign_kernels.reference.adamw import decode, encode
from mmalign_kernels.triton import adamw as adamw_triton
from mmalign_kernels.triton import launch
from mmalign_kernels.triton.adamw import _row_scale, _write_moment

from .host_library import HostLibrary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter
SETTINGS = (1e-2, 0.9, 0.95, 1e-8, 0.1)  # learning rate, betas, eps, weight decay


@pytest.fixture(scope="module")
def host(host_library_file):
    return HostLibrary(host_library_file)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draws(rng, num):
    return rng.integers(0, 1 << 32, num, dtype=np.uint32)


def bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # the known answers that come with Random123 of the authors
        ("00000000 00000000", "00000000 " * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff " * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "a4093822 299f31d0",
            "243f6a88 85a308d3 13198a2e 03707344",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(host, key, counter, words):
    low, high = (int(x, 16) for x in key.split())
    counters = np.array([int(x, 16) for x in counter.split()], dtype=np.uint32)
    found = np.zeros(4, np.uint32)
    host.philox(high << 32 | low, counters, 1, found)
    assert [f"{x:08x}" for x in found] == words.split()


def test_random_rounding_takes_a_neighbour_without_bias(host, rng):
    num = 1 << 16
    for value in np.float32([1 + 2**-9, -3.3, 1e-40, 6.1e4]):
        x, rounded = np.full(num, value), np.zeros(num, np.uint16)
        host.round_randomly(x, np.arange(num, dtype=np.uint32), num, rounded)  # every draw once
        low, high = np.unique(bf16(rounded))
        assert low <= value <= high
        assert bf16(rounded).astype(np.float64).mean() == pytest.approx(value, rel=1e-12)
        gap = np.float32([low, high]).view(np.int32)
        assert abs(int(gap[1]) - int(gap[0])) == 1 << 16  # neighbours


def test_random_rounding_of_special_numbers(host, rng):
    exact = np.float32([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf])
    not_a_number = np.uint32([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF]).view(np.float32)
    for _ in range(20):
        x = np.concatenate([exact, not_a_number])
        rounded = np.zeros(len(x), np.uint16)
        host.round_randomly(x, draws(rng, len(x)), len(x), rounded)
        assert (bf16(rounded[:6]).view(np.uint32) == exact.view(np.uint32)).all()
        assert np.isnan(bf16(rounded[6:])).all()


def test_split_master_is_torchs_bit_for_bit(host, rng):
    special = np.float32([0.0, -0.0, 1 + 2**-8, 1 + 2**-9, 3e-45, 1e38, np.inf, -np.inf])
    numbers = np.concatenate([rng.integers(0, 1 << 32, 1 << 18, np.uint32).view("f4"), special])
    numbers = numbers[~np.isnan(numbers)]
    weights, remainders = (np.zeros(len(numbers), t) for t in (np.uint16, np.int16))
    host.split_master(numbers, len(numbers), weights, remainders)
    expected = split_master(torch.from_numpy(numbers))
    assert (weights.view(np.int16) == expected[0].view(torch.int16).numpy()).all()
    assert (remainders == expected[1].numpy()).all()
    joined = np.zeros_like(numbers)
    host.join_master(weights, remainders, len(numbers), joined)
    assert (joined.view(np.uint32) == numbers.view(np.uint32)).all()
    assert (joined == join_master(*expected).numpy()).all()


def test_split_master_of_nan_is_nan_for_both_readers(host):
    masters = np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]).view(np.float32)
    weights, remainders, joined = np.zeros(3, np.uint16), np.zeros(3, np.int16), np.zeros(3, "f4")
    host.split_master(masters, 3, weights, remainders)
    host.join_master(weights, remainders, 3, joined)
    assert np.isnan(bf16(weights)).all() and np.isnan(joined).all()


def small_floats(exponent_bits, mantissa_bits):
    """Values of all codes: the definition, spelled out in fp64."""
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes % (1 << mantissa_bits)
    lowest = 2.0 - (1 << exponent_bits)
    fraction = mantissa / (1 << mantissa_bits)
    normal = (1 + fraction) * 2.0 ** (lowest + exponent - 1)
    return np.where(exponent == 0, fraction * 2.0**lowest, normal)


@pytest.mark.parametrize(
    ("moment", "exponent_bits", "signed"), [("first", 4, True), ("second", 5, False)]
)
def test_quantisation_takes_a_neighbouring_code(host, rng, moment, exponent_bits, signed):
    num = 1000  # the last block is cut
    x = np.exp(rng.normal(-3, 4, num)).astype(np.float32)
    x[::50] = 0
    x *= np.where(rng.random(num) < 0.5, -1, 1).astype("f4") if signed else np.float32(1)
    codes, scales, decoded = np.zeros(num, np.uint8), np.zeros(8, "f4"), np.zeros(num, "f4")
    getattr(host, f"quantize_{moment}")(x, draws(rng, num), num, codes, scales, decoded)
    values, scale = small_floats(exponent_bits, 3), np.repeat(scales, 128)[:num].astype("f8")
    largest = [np.abs(block).max() for block in np.split(x, range(128, num, 128))]
    np.testing.assert_allclose(scales * values[-1], largest, rtol=1e-6)
    sizes = codes & 127 if signed else codes
    np.testing.assert_allclose(np.abs(decoded), values[sizes] * scale, rtol=1e-6)
    assert ((decoded >= 0) | (x < 0)).all() and (decoded[x == 0] == 0).all()
    place = np.clip(np.searchsorted(values, np.abs(x) / scale, side="right") - 1, 0, None)
    above = np.minimum(place + 1, len(values) - 1)
    tiny = (place == 0) & (sizes == 1)  # a second moment never becomes zero
    ok = (sizes == place) | (sizes == above) | tiny
    ok |= np.abs(np.abs(decoded) / np.maximum(np.abs(x), 1e-30) - 1) < 1e-6  # on a code already
    assert ok.all()
    assert signed or (decoded[x > 0] > 0).all()


@pytest.mark.parametrize("moment", ("first", "second"))
def test_quantisation_is_unbiased(host, moment):
    num = 1 << 16
    for value in (0.9, 0.0312, 2e-3):
        x = np.full(num, value, np.float32)
        x[::128] = 1  # the blocks' scale
        shared = np.arange(num, dtype=np.uint32) * np.uint32(40503)  # every draw once, mixed
        codes, scales, decoded = (
            np.zeros(num, "u1"),
            np.zeros(num // 128, "f4"),
            np.zeros(num, "f4"),
        )
        getattr(host, f"quantize_{moment}")(x, shared, num, codes, scales, decoded)
        rest = decoded[x != 1].astype(np.float64)
        assert len(np.unique(rest)) <= 2
        assert rest.mean() == pytest.approx(value, rel=4 * 0.125 / num**0.5)


@pytest.mark.parametrize("moment", ("first", "second"))
def test_tensors_have_the_same_codes(host, rng, moment):
    """In the three implementations, bit for bit."""
    num, code = 1000, {"first": FIRST, "second": SECOND}
    x = np.exp(rng.normal(-3, 4, num)).astype(np.float32)
    x[::50], x[256:384] = 0, 0
    x[384:512] *= 2.0**-140  # below every reciprocal in fp32
    x *= np.where(rng.random(num) < 0.5, -1, 1).astype("f4") if moment == "first" else 1
    bits, (codes, scales, decoded) = draws(rng, num), (np.zeros(num, t) for t in ("u1", "f4", "f4"))
    getattr(host, f"quantize_{moment}")(x, bits, num, codes, scales[:8], decoded)
    given = torch.from_numpy(x), torch.from_numpy((bits & 0xFFFF).astype("i4")), code[moment]
    our_codes, our_scales = encode(*given)
    assert (our_codes.numpy() == codes).all() and (our_scales.numpy() == scales[:8]).all()
    ours = decode(our_codes, our_scales, code[moment]).numpy()
    assert (ours == decoded).all() and np.isfinite(decoded).all()
    on_device = [torch.from_numpy(y).to(DEVICE) for y in (x, bits.view("i4"))]
    triton_codes, triton_scales = torch.zeros_like(on_device[0]).byte(), torch.zeros(8).to(DEVICE)
    _quantize_kernel[(1,)](*on_device, triton_codes, triton_scales, num, 8, moment == "second")
    assert (triton_codes.cpu().numpy() == codes).all()
    assert (triton_scales.cpu().numpy() == scales[:8]).all()


@triton.jit
def _quantize_kernel(
    x_ptr, draws_ptr, codes_ptr, scales_ptr, num, BLOCKS: tl.constexpr, SECOND: tl.constexpr
):
    block = tl.arange(0, BLOCKS)[:, None]
    at = block * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + at, at < num, other=0)
    scale = _row_scale(x)
    tl.store(scales_ptr + block, scale)
    draw = tl.load(draws_ptr + at, at < num, other=0)
    _write_moment(x, scale, draw, codes_ptr, at, at < num, True, SECOND)


def test_quantisation_keeps_nan(host, rng):
    x = rng.random(256, dtype=np.float32)
    x[3] = np.nan
    codes, scales, decoded = np.zeros(256, "u1"), np.zeros(2, "f4"), np.zeros(256, "f4")
    host.quantize_second(x, draws(rng, 256), 256, codes, scales, decoded)
    assert np.isnan(decoded[:128]).all() and not np.isnan(decoded[128:]).any()


class Adamw:
    """One tensor through the host's copy of the kernel's arithmetic."""

    def __init__(self, host, masters, kind):
        self.host, self.kind = host, kind
        self.masters = masters.copy()
        self.weights, self.remainders = (np.zeros(len(masters), t) for t in (np.uint16, np.int16))
        host.split_master(masters, len(masters), self.weights, self.remainders)
        self.moments = [np.zeros(len(masters), np.float32) for _ in range(2)]

    def step(self, grads, count, seed=0, place=0, grad_scale=0.7):
        stored = {
            "fp32": (self.masters, None, None),
            "split": (None, self.weights, self.remainders),
            "rounded": (None, self.weights, None),
        }[self.kind]
        settings = (grad_scale, count, *SETTINGS, seed, place)
        self.host.adamw(*stored, grads, *self.moments, len(grads), *settings)


def numpy_adamw(p, m, v, grad, count):
    """The formula in fp32, every operation rounded by itself, as NumPy does."""
    rate, beta1, beta2, eps, decay = SETTINGS
    f = np.float32
    g = grad * f(0.7)
    m = m + f(1 - beta1) * (g - m)
    v = f(beta2) * v + f(1 - beta2) * g * g
    p = p - f(rate * decay) * p
    root = np.sqrt(v) * f((1 - beta2**count) ** -0.5) + f(eps)
    return p - f(rate / (1 - beta1**count)) * m / root, m, v


def test_adamw_is_numpys_bit_for_bit_and_the_split_master_too(host, rng):
    start = rng.normal(0, 1, 3000).astype(np.float32)
    exact, split = Adamw(host, start, "fp32"), Adamw(host, start, "split")
    p, m, v = start, *(np.zeros_like(start) for _ in range(2))
    for count in range(1, 21):
        grads = rng.normal(0, 10.0 ** rng.integers(-6, 2, 3000), 3000).astype(np.float32)
        p, m, v = numpy_adamw(p, m, v, grads, count)
        for run in (exact, split):
            run.step(grads, count)
        assert (exact.masters == p).all()
        joined = np.zeros_like(p)
        host.join_master(split.weights, split.remainders, len(p), joined)
        assert (joined == p).all()
        for run in (exact, split):
            assert (run.moments[0] == m).all() and (run.moments[1] == v).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_adamw_draws_the_bits_of_the_triton_kernel(host, rng, monkeypatch):
    """The same weights, bit for bit, after a step with the block that Triton takes on a GPU."""
    monkeypatch.setattr(launch, "tile_bytes", lambda x: 8192)
    num, seed, count = 5000, 7 << 33 | 12345, 3
    ours = [Adamw(host, rng.normal(0, 1, num).astype("f4"), "rounded") for _ in range(2)]
    grads = [rng.normal(0, 1, num).astype(np.float32) for _ in ours]

    def tensors(arrays):
        return [torch.from_numpy(x.copy()) for x in arrays]

    params = [x.view(torch.bfloat16) for x in tensors(run.weights.view("i2") for run in ours)]
    moments = [tensors(run.moments[i] for run in ours) for i in range(2)]
    state = *moments, [], [], []
    adamw_triton.adamw_update(
        params, tensors(grads), *state, torch.tensor(0.7), count, *SETTINGS, seed
    )
    for place, (run, param) in enumerate(zip(ours, params, strict=True)):
        run.step(grads[place], count, seed, place)
        theirs = param.view(torch.int16).numpy().view(np.uint16)
        assert (run.weights == theirs).all()
