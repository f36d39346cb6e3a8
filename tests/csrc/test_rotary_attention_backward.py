"""The backward pass of csrc/'s rotary attention: the blocks of both kernels on the host, their
machine code, their arguments. What a GPU computes is in test_rotary_attention_on_gpu.py."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import rotary_attention as rotary_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from csrc.build import ARCHITECTURES
from tests.kernels.accuracy import assert_accurate
from tests.kernels.test_attention import Case

from . import machine_code
from .host_library import HostLibrary
from .machine_code import count
from .test_rotary_attention import KERNELS, arguments, bf16, bounds_of, from_bits, run_block

RATIO = 4e-3  # of an error to its fp64 oracle; half of what the GPU's tests allow


@pytest.fixture(scope="module")
def host(host_library_file):
    return HostLibrary(host_library_file)


def run_blocks(host, case, forward, grad_out, num_workers=1, seed=0):
    """The kernels' threads on the host: gradient of qkv, bf16."""
    out, logsumexp = forward
    qkv, num_tokens = bf16(case.qkv.detach().numpy()), len(case.qkv)
    grad = np.full(qkv.shape, 0x7FC0, np.uint16)  # NaN
    tables = (case.cos.numpy(), case.sin.numpy(), case.position_ids.int().numpy())
    sizes = (num_tokens, len(case.lengths), case.num_heads, case.num_kv, case.head_dim)
    failed = host.attention_backward(
        qkv,
        out.view(torch.int16).numpy().view(np.uint16),
        bf16(grad_out.numpy()),
        logsumexp.numpy(),
        *tables,
        bounds_of(case.lengths),
        *sizes,
        case.causal,
        num_workers,
        seed,
        grad,
    )
    assert not failed
    return from_bits(grad)


def case_of(lengths, heads, causal):
    """A case in values of bf16, at positions in no order, and a gradient of its output."""
    torch.manual_seed(0)
    case = Case(lengths, heads, causal)
    case.qkv = case.qkv.bfloat16().float()
    case.position_ids = case.position_ids + torch.arange(len(case.qkv)) % 2
    grad_out = torch.randn(len(case.qkv), case.num_heads * case.head_dim)
    return case, grad_out.bfloat16().float()


def gradient_by_hugging_face(case, grad_out, dtype):
    qkv = case.qkv.detach().to(dtype).requires_grad_()
    return torch.autograd.grad(case.hugging_face(qkv), qkv, grad_out.to(dtype))[0]


@pytest.mark.parametrize(
    ("lengths", "heads", "causal", "num_workers"),
    [  # one token, nothing, a row less and more than a tile; more tiles than stages; groups
        ([1, 37, 0, 63, 65, 127, 129, 1], (2, 1, 128), True, 2),
        ([300], (1, 1, 128), True, 1),
        ([500], (2, 1, 64), True, 2),
        ([64, 200], (4, 2, 64), True, 1),
        ([1, 200, 128], (2, 2, 128), False, 2),
        ([5, 330], (2, 1, 64), False, 1),
    ],
)
def test_blocks_give_the_gradient(host, lengths, heads, causal, num_workers):
    """Fetching, bringing and multiplying threads in a random order, against transformers."""
    case, grad_out = case_of(lengths, heads, causal)
    forward = run_block(host, case)
    found = run_blocks(host, case, forward, grad_out, num_workers)
    peer, oracle = (
        gradient_by_hugging_face(case, grad_out, x) for x in (torch.bfloat16, torch.float64)
    )
    sizes = [n * case.head_dim for n in (case.num_heads, case.num_kv, case.num_kv)]
    parts = (x.split(sizes, 1) for x in (found, peer, oracle))
    for name, *part in zip("qkv", *parts, strict=True):
        assert_accurate(name, *part, 1, RATIO)
    again = run_blocks(host, case, forward, grad_out, 3, seed=1)  # another order: the same bits
    assert torch.equal(found.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("causal", (True, False))
def test_blocks_keep_samples_apart(host, causal):
    """NaN in a sample reaches neither the one before it nor the one after it."""
    case, grad_out = case_of([70, 90, 61], (2, 1, 64), causal)
    clean = run_blocks(host, case, run_block(host, case), grad_out)
    case.qkv[70:160] = torch.nan
    grad_out[70:160] = torch.nan
    found = run_blocks(host, case, run_block(host, case), grad_out)
    assert torch.equal(found[:70], clean[:70]) and torch.equal(found[160:], clean[160:])
    assert found[70:160].isnan().all()


# -- the library


@pytest.fixture
def library(cuda_library_file, monkeypatch):
    monkeypatch.setenv("MMALIGN_CUDA_LIBRARY", str(cuda_library_file))
    cuda_library.load()
    return cuda_library_file


def test_no_stack_no_spills(cuda_library_file):
    kernels = [x for x in machine_code.kernels(cuda_library_file) if "_gradient_" in x.name]
    assert len(kernels) == 3 * len(KERNELS) * len(ARCHITECTURES)
    assert not [x for x in kernels if x.stack_bytes or x.local_bytes]
    # Warpgroups hand registers over: 40 + 2 * 232 can not exceed 3 * what the launch gives.
    hopper = [x for x in kernels if x.name.startswith("rotary") and x.architecture == "sm_90a"]
    assert len(hopper) == 2 * len(KERNELS) and all(x.registers == 168 for x in hopper)


@pytest.fixture(scope="module")
def hopper(cuda_library_file):
    return machine_code.programs(cuda_library_file, "sm_90a")


@pytest.mark.parametrize(("name", "head_dim"), KERNELS)
@pytest.mark.parametrize("of_keys", (False, True))
def test_hopper_instructions(hopper, of_keys, name, head_dim):
    opcodes = Counter(hopper[f"rotary_gradient_kernel<{int(of_keys)}, {name}, {head_dim}>"])
    scores, gradients = 2 * head_dim // 16, (1 + of_keys) * 64 // 16
    narrow = scores + (gradients if head_dim == 64 else 0)
    assert count(opcodes, "HGMMA", "64x64x16") == narrow
    assert count(opcodes, "HGMMA") == scores + gradients
    assert count(opcodes, "UTMALDG") == 3 * 2 * head_dim // 64  # own tiles twice, passing ones
    assert count(opcodes, "USETMAXREG") == 2
    assert count(opcodes, "LDL") + count(opcodes, "STL") == 0
    assert count(opcodes, "STG", "128") == (1 + of_keys) * 2 * head_dim // 32
    assert count(opcodes, "STG") == count(opcodes, "STG", "128")
    prepare = Counter(hopper[f"prepare_gradient_kernel<{name}, {head_dim}>"])
    assert count(prepare, "LDG", "128") >= 2 * 6 + 4 and count(prepare, "STG", "128") >= 2 * 2


@pytest.mark.parametrize(("name", "head_dim"), KERNELS)
@pytest.mark.parametrize("of_keys", (False, True))
def test_arithmetic_while_products_are_under_way(hopper, of_keys, name, head_dim):
    """Powers before the wait for slopes; where keys are owned, values' product goes on then."""
    opcodes = hopper[f"rotary_gradient_kernel<{int(of_keys)}, {name}, {head_dim}>"]
    kinds = {"HGMMA": "product", "WARPGROUP.DEPBAR": "wait", "MUFU.EX2": "power"}
    events = [kinds[x] for opcode in opcodes for x in kinds if opcode.startswith(x)]
    order = [(kind, len(list(run))) for kind, run in groupby(events)]
    values = [("product", 64 // 16)] if of_keys else []
    assert order == [
        *[("product", 2 * head_dim // 16), ("wait", 1), ("power", 64 // 2)],
        *[*values, ("wait", 1), ("product", 64 // 16), ("wait", 1)],
    ]


def backward_arguments(heads=(4, 2, 64), dtype=torch.bfloat16, **changes):
    whole = arguments(heads=heads, dtype=dtype)
    rows, (num_heads, _, head_dim) = len(whole["qkv"]), heads
    out = torch.ones(rows, num_heads * head_dim, dtype=dtype)
    results = {"grad_out": out, "out": out.clone(), "logsumexp": torch.ones(rows, num_heads)}
    return whole | results | changes


def test_schema_has_the_arguments_of_the_operation(library):
    schema = torch.ops.mmalign_cuda.rotary_attention_bwd.default._schema
    function = rotary_cuda.rotary_attention_bwd.__code__
    names = list(function.co_varnames[: function.co_argcount])
    names.remove("max_seqlen")
    assert [x.name for x in schema.arguments] == names


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_fake_promises_what_the_family_declares(library, dtype):
    with FakeTensorMode(), torch.device("cuda"):
        call = backward_arguments(dtype=dtype)
        ours = cuda_library.operation("rotary_attention_bwd")(**call)
        theirs = torch.ops.mmalign.rotary_attention_bwd(max_seqlen=6, **call)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("qkv is not on a CUDA device", {}),
        ("qkv is Float, expected BFloat16 or Half", {"dtype": torch.float32}),
        ("qkv has 800 columns for 8 heads, expected 64 or 128.*triton", {"heads": (4, 2, 100)}),
        (r"grad_out has shape \(6, 255\), expected", {"grad_out": torch.ones(6, 255).bfloat16()}),
        ("grad_out is Half, expected BFloat16", {"grad_out": torch.ones(6, 256).half()}),
        ("grad_out of shape .* contiguous", {"grad_out": torch.ones(256, 6).bfloat16().t()}),
        (r"out has shape \(5, 256\), expected", {"out": torch.ones(5, 256).bfloat16()}),
        (r"logsumexp has shape \(6, 3\), expected \(6, 4\)", {"logsumexp": torch.ones(6, 3)}),
        ("logsumexp is Double, expected Float", {"logsumexp": torch.ones(6, 4).double()}),
        ("position_ids is Long, expected Int", {"position_ids": torch.zeros(6).long()}),
    ],
)
def test_wrong_arguments(library, words, changes):
    with pytest.raises(RuntimeError, match=f"rotary_attention_bwd: {words}"):
        cuda_library.operation("rotary_attention_bwd")(**backward_arguments(**changes))
