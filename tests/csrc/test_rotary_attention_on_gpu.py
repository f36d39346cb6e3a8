"""The Hopper kernels of rotary attention, forward and backward, against transformers."""

import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.cuda import library as cuda_library
from mmalign_kernels.cuda import rotary_attention as rotary_cuda
from mmalign_kernels.triton import rotary_attention as rotary_triton

from tests.kernels.accuracy import assert_same_bits, compare
from tests.kernels.packed_samples import offsets
from tests.kernels.test_attention import Case

pytestmark = pytest.mark.gpu
HEADS = ((4, 4, 128), (8, 2, 128), (3, 3, 64), (4, 1, 64))  # heads, key heads, head_dim
LENGTHS = [1, 37, 130, 0, 128, 127, 1, 515]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_hopper():
    reason = cuda_library.missing() if torch.cuda.is_available() else "no CUDA device"
    if not reason and torch.cuda.get_device_capability() != (9, 0):
        reason = "no Hopper GPU"
    if reason:
        pytest.skip(f"the kernels of csrc/: {reason}")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that nothing wrote is NaN
    with torch.device("cuda"), dispatch.use_backend("cuda"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_hugging_face(heads, dtype, causal):
    case = Case(LENGTHS, heads, causal)
    compare(case.ours, case.hugging_face, (case.qkv,), dtype)


@pytest.mark.parametrize("lengths", ([1] * 700, [1100], [2300, 20, 20], [512] * 9))
def test_lengths(lengths):
    case = Case(lengths, (2, 1, 128))
    compare(case.ours, case.hugging_face, (case.qkv,), torch.bfloat16)


def call_of(case, dtype=torch.bfloat16):
    settings = (max(case.lengths), case.num_heads, case.num_kv, case.causal)
    qkv = case.qkv.detach().to(dtype)
    return (qkv, case.cos, case.sin, case.position_ids, offsets(case.lengths), *settings)


@pytest.mark.parametrize("heads", ((32, 32, 128), (32, 4, 64)))
@pytest.mark.parametrize("causal", (True, False))
def test_more_items_than_workers(causal, heads):
    """Samples as in training, beside Triton's kernels: forward, and backward after either."""
    lengths = torch.randint(1, 1100, (24,), device="cpu").tolist()
    call = call_of(Case(lengths, heads, causal))
    found, wanted = (x.rotary_attention_fwd(*call) for x in (rotary_cuda, rotary_triton))
    grad_out = torch.randn_like(found[0])
    for forward in (found, wanted):
        arguments = (grad_out, call[0], *forward, *call[1:])
        ours, theirs = (x.rotary_attention_bwd(*arguments) for x in (rotary_cuda, rotary_triton))
        found, wanted = (*found, ours), (*wanted, theirs)
    for ours, theirs, limit in zip(found, wanted, (4e-3, 1e-5, 8e-3, 8e-3), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - theirs).float().norm() <= limit * theirs.float().norm()


def test_same_bits():
    case = Case(LENGTHS * 4, (16, 16, 128))
    case.qkv = case.qkv.detach().bfloat16().requires_grad_()
    for _ in range(5):
        assert_same_bits(case.ours, (case.qkv,))


def test_samples_keep_apart():
    case = Case([130, 90, 61], (2, 1, 64))
    grad_out = torch.randn(281, 128, dtype=torch.bfloat16)

    def results():
        call = call_of(case)
        out, logsumexp = rotary_cuda.rotary_attention_fwd(*call)
        arguments = (grad_out, call[0], out, logsumexp, *call[1:])
        return out, rotary_cuda.rotary_attention_bwd(*arguments)

    clean = results()
    case.qkv = case.qkv.detach().clone()
    case.qkv[130:220] = grad_out[130:220] = torch.nan
    for found, expected in zip(results(), clean, strict=True):
        assert torch.equal(found[:130], expected[:130])
        assert torch.equal(found[220:], expected[220:])


def test_wide_indices_and_no_rows():
    case = Case(LENGTHS, (2, 2, 128))
    qkv, cos, sin, position_ids, cu_seqlens, *settings = call_of(case)
    found = [
        rotary_cuda.rotary_attention_fwd(qkv, cos, sin, p, c, *settings)[0]
        for p, c in ((position_ids, cu_seqlens), (position_ids.long(), cu_seqlens.long()))
    ]
    assert torch.equal(*found)
    empty = torch.zeros(2, dtype=torch.int32)
    out, logsumexp = rotary_cuda.rotary_attention_fwd(
        qkv[:0], cos, sin, position_ids[:0], empty, *settings
    )
    assert out.shape == (0, 256) and logsumexp.shape == (0, 2)
    grad = rotary_cuda.rotary_attention_bwd(
        out, qkv[:0], out, logsumexp, cos, sin, position_ids[:0], empty, *settings
    )
    assert grad.shape == qkv[:0].shape


def test_rows_past_2_31_elements():
    """524,300 tokens of 32 heads: the last sample alone, and behind all others."""
    lengths = [1025] * 511 + [520]
    num_tokens = sum(lengths)
    qkv = torch.randn(num_tokens, 48 * 128, dtype=torch.bfloat16)  # 8 key heads: 6.4 GB
    cos, sin = (torch.rand(2048, 64) for _ in range(2))
    position_ids = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    grad_out = torch.randn(num_tokens, 32 * 128, dtype=torch.bfloat16)

    def results(rows, lengths):
        call = (cos, sin, position_ids[rows], offsets(lengths), 1025, 32, 8, True)
        forward = rotary_cuda.rotary_attention_fwd(qkv[rows], *call)
        return forward[0], rotary_cuda.rotary_attention_bwd(
            grad_out[rows], qkv[rows], *forward, *call
        )

    whole = results(slice(None), lengths)
    alone = results(slice(-520, None), [520])
    for found, expected in zip(whole, alone, strict=True):
        assert torch.equal(found[-520:], expected)
