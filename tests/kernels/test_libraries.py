"""Library backends: what reaches the library, and that its answer comes back, on the CPU.

The libraries are stand-ins with their recorded signatures (library_stand_ins.py); PyTorch's own
variable-length attention is called through its real operators. test_libraries_gpu.py runs the real
ones.
"""

import pytest
import torch
from mmalign_kernels import adamw_step, add_rms_norm, dispatch, full_attention, rms_norm
from mmalign_kernels.libraries import LIBRARIES
from mmalign_kernels.rotary_attention import rotary_attention_bwd, rotary_attention_fwd

from . import library_stand_ins
from .accuracy import compare, results
from .packed_samples import offsets
from .test_attention import Case
from .test_rms_norm import hugging_face_add_norm, hugging_face_norm, our_add_norm, our_norm, rows

ATTENTION = [name for name, library in LIBRARIES.items() if "rotary_attention" in library.families]
HEADS = ((2, 2, 64), (4, 2, 100), (4, 1, 128))  # heads, key heads, head_dim
LENGTHS = [1, 19, 0, 33, 19]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The stand-ins, and how often each was called."""
    yield from library_stand_ins.install(monkeypatch)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "full"))
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("library", ATTENTION)
def test_rotary_attention_equals_hugging_face(library, heads, causal, calls):
    case = Case(lengths=LENGTHS, heads=heads, causal=causal)
    with dispatch.use_backend(library):
        compare(case.ours, case.hugging_face, (case.qkv,), torch.float32)
    counts = [n for name, n in calls.items() if name != "from_seqlens"]
    assert counts == [1, 1], "one call forward, one backward"


@pytest.mark.parametrize("head_dim", (64, 100, 128))
@pytest.mark.parametrize("library", ATTENTION)
def test_full_attention_equals_the_reference(library, head_dim):
    qkv = torch.randn(sum(LENGTHS), 3 * 2 * head_dim, requires_grad=True)

    def ours(qkv):
        return full_attention(qkv, offsets(LENGTHS).long(), 40, 2)

    expected = results(ours, (qkv,))
    with dispatch.use_backend(library):
        found = results(ours, (qkv,))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ATTENTION)
def test_logsumexp_is_the_references(library):
    """It has the reference's shape and layout, which compiled code relies on."""
    case = Case(lengths=LENGTHS, heads=(4, 2, 64))
    tables = case.cos, case.sin, case.position_ids, offsets(LENGTHS)
    found = []
    for backend in (library, "reference"):
        with dispatch.use_backend(backend):
            forward = dispatch.implementation("rotary_attention_fwd", "rotary_attention", "cpu")
            found.append(forward(case.qkv.detach(), *tables, 33, 4, 2, True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.is_contiguous()


@pytest.mark.parametrize("library", ATTENTION)
@pytest.mark.parametrize("head_dim", (64, 100))
def test_compiled_code_may_call_a_library(library, head_dim):
    """Shapes, strides and aliases are those that tracing was told."""
    case = Case(lengths=[3, 5], heads=(2, 1, head_dim))
    tables = case.cos, case.sin, case.position_ids, offsets([3, 5])
    inputs = case.qkv.detach(), *tables, 5, 2, 1, True
    utilities = "test_schema", "test_faketensor"
    with dispatch.use_backend(library):
        fwd, bwd = rotary_attention_fwd, rotary_attention_bwd
        torch.library.opcheck(fwd.registered, inputs, test_utils=utilities)
        out, logsumexp = fwd(*inputs)
        inputs = torch.ones_like(out), inputs[0], out, logsumexp, *inputs[1:]
        torch.library.opcheck(bwd.registered, inputs, test_utils=utilities)


@pytest.mark.parametrize("library", ATTENTION)
def test_no_tokens(library):
    qkv = torch.randn(0, 3 * 64, requires_grad=True)
    with dispatch.use_backend(library):
        out = full_attention(qkv, offsets([]), 0, 1)
        assert out.shape == (0, 64)
        assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("head_dim", (64, 100))
def test_heads_are_rotated_in_triton(head_dim):
    """Rotation for a library and its inverse, in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off; test_libraries_gpu.py runs the kernel")
    case = Case(lengths=LENGTHS, heads=(4, 2, head_dim))
    with dispatch.use_backend("flash_attn,triton"):
        compare(case.ours, case.hugging_face, (case.qkv,), torch.float32)


def test_xformers_mask_is_made_once_for_a_batch(calls):
    """Its lengths are needed on the host, which waits for the device."""
    qkv, cu_seqlens = torch.randn(20, 3 * 64, requires_grad=True), offsets([7, 13])
    with dispatch.use_backend("xformers"):
        for _ in range(3):
            full_attention(qkv, cu_seqlens, 13, 1).sum().backward()
        assert calls["from_seqlens"] == 1
        first = full_attention(qkv, cu_seqlens, 13, 1)
        cu_seqlens[1] = 10  # written to: another mask
        assert not torch.equal(full_attention(qkv, cu_seqlens, 13, 1), first)


def test_backward_runs_on_the_library_of_forward(calls):
    case = Case(lengths=[5, 9])
    with dispatch.use_backend("flash_attn_4"):
        out = case.ours(case.qkv)
    out.sum().backward()
    assert calls == {"_flash_attn_fwd": 1, "_flash_attn_bwd": 1}


@pytest.mark.parametrize("frozen", (False, True))
def test_apex_norms_equal_hugging_face(frozen, calls):
    weight = (1 + torch.randn(96) / 4).requires_grad_(not frozen)
    x, residual = rows(33, 96), rows(33, 96, spread=False)
    with dispatch.use_backend("apex"):
        compare(our_norm, hugging_face_norm, (x, weight), torch.float32)
        compare(our_add_norm, hugging_face_add_norm, (x, residual, weight), torch.float32)
    assert calls == {"rms_forward_affine": 2, "rms_backward_affine": 2}


def test_apex_norm_keeps_what_the_reference_keeps():
    x, weight = rows(5, 32).detach(), torch.ones(32)
    found = []
    for backend in ("apex", "reference"):
        with dispatch.use_backend(backend):
            found.append(dispatch.implementation("rms_norm_fwd", "rms_norm", "cpu")(x, weight, 0.1))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", (False, True))
def test_apex_adamw_equals_torch(clip, calls):
    params = [torch.randn(3, 5), torch.randn(7)]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    scale = torch.tensor(0.3)
    settings = dict(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in params]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad * scale if clip else grad.clone()
        optimizer.step()
        with dispatch.use_backend("apex"):
            factor = scale if clip else None
            adamw_step(params, grads, *moments, step=step, grad_scale=factor, **settings)
    for our, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(our, their.detach(), rtol=2e-6, atol=2e-7)
    assert calls == {"multi_tensor_adam_capturable" if clip else "multi_tensor_adam": 5}


def test_two_libraries_serve_their_families(calls, monkeypatch, set_backend):
    set_backend("apex, flash_attn_3,reference")
    monkeypatch.setattr(dispatch, "_override", None)
    case, x = Case(lengths=[4, 3]), torch.randn(7, 32)
    case.ours(case.qkv.detach())
    add_rms_norm(x, x, torch.ones(32), 1e-5)
    rms_norm(x, torch.ones(32), 1e-5)
    assert calls == {"_flash_attn_forward": 1, "rms_forward_affine": 2}
