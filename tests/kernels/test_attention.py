"""Rotary and full attention against transformers' eager attention under a block-diagonal mask."""

from types import SimpleNamespace

import pytest
import torch
from mmalign_kernels import full_attention, rotary_attention
from mmalign_kernels.reference import full_attention as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .accuracy import assert_same_bits, compare, results
from .packed_samples import block_mask, offsets, plain_attention, positions, rotary_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADS = ((2, 2, 64), (4, 2, 64), (2, 1, 80), (3, 3, 100), (2, 1, 128))  # and key heads, head_dim
LENGTHS = [1, 37, 130, 37, 37, 1]


class Case:
    """The arguments of one call, and transformers' answer to it."""

    def __init__(self, lengths=LENGTHS, heads=(2, 1, 16), causal=True):
        self.lengths, self.causal = lengths, causal
        self.num_heads, self.num_kv, self.head_dim = heads
        columns = (self.num_heads + 2 * self.num_kv) * self.head_dim
        self.qkv = torch.randn(sum(lengths), columns, requires_grad=True)
        self.cos, self.sin = rotary_table(2 * max(lengths), self.head_dim)
        self.position_ids = positions(lengths)

    def ours(self, qkv: Tensor) -> Tensor:
        return rotary_attention(
            qkv,
            self.cos,
            self.sin,
            self.position_ids,
            offsets(self.lengths),
            max(self.lengths),
            self.num_heads,
            self.num_kv,
            self.causal,
        )

    def hugging_face(self, qkv: Tensor) -> Tensor:
        heads = qkv.unflatten(1, (-1, self.head_dim)).transpose(0, 1)[None]
        q, k, v = heads.split((self.num_heads, self.num_kv, self.num_kv), 1)
        angles = (torch.cat((x, x), 1)[self.position_ids][None] for x in (self.cos, self.sin))
        q, k = apply_rotary_pos_emb(q, k, *(x.to(qkv.dtype) for x in angles))
        mask = block_mask(self.lengths, self.causal, qkv.dtype)
        if qkv.dtype == torch.float64:
            return plain_attention(q, k, v, mask)
        groups = SimpleNamespace(num_key_value_groups=self.num_heads // self.num_kv, training=False)
        out, _ = eager_attention_forward(groups, q, k, v, mask, self.head_dim**-0.5)
        return out[0].flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_rotary_attention_equals_hugging_face(heads, dtype):
    case = Case(heads=heads)
    compare(case.ours, case.hugging_face, (case.qkv,), dtype)


def test_not_causal():
    case = Case(causal=False)
    compare(case.ours, case.hugging_face, (case.qkv,), torch.float32)


def test_long_sample():
    case = Case(lengths=[1100], heads=(1, 1, 64))
    compare(case.ours, case.hugging_face, (case.qkv,), torch.float32)


def test_gradcheck(backend):
    case = Case(lengths=[1, 3, 3, 2], heads=(2, 1, 4))
    qkv = case.qkv.detach().double().requires_grad_()
    torch.autograd.gradcheck(case.ours, (qkv,), fast_mode=backend == "triton")


@pytest.mark.parametrize("lengths", (LENGTHS, [33] * 4))
def test_packed_equals_one_at_a_time(lengths):
    case = Case(lengths)
    weights = torch.randn(sum(lengths), case.num_heads * case.head_dim)
    packed = case.ours(case.qkv)
    (grad,) = torch.autograd.grad((packed * weights).sum(), case.qkv)
    bounds = offsets(lengths).tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        single = Case([end - begin])
        single.cos, single.sin = case.cos, case.sin
        qkv = case.qkv[begin:end].detach().requires_grad_()
        out = single.ours(qkv)
        torch.testing.assert_close(out, packed[begin:end])
        (single_grad,) = torch.autograd.grad((out * weights[begin:end]).sum(), qkv)
        torch.testing.assert_close(single_grad, grad[begin:end])


def test_permuted_samples_permute_the_result():
    case = Case()
    order = [3, 0, 5, 1, 4, 2]
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    rows = torch.cat([rows[i] for i in order])
    permuted = Case([LENGTHS[i] for i in order])
    permuted.cos, permuted.sin = case.cos, case.sin
    torch.testing.assert_close(permuted.ours(case.qkv[rows]), case.ours(case.qkv)[rows])


def test_every_argument_matters():
    case = Case()
    before = results(case.ours, (case.qkv,))
    changes = {
        "lengths": LENGTHS[::-1],
        "position_ids": case.position_ids.flip(0),
        "cos": case.cos.flip(0),
        "sin": case.sin.flip(0),
        "causal": False,
    }
    for name, value in changes.items():
        old = getattr(case, name)
        setattr(case, name, value)
        after = results(case.ours, (case.qkv,))
        setattr(case, name, old)
        for result in ("output 0", "gradient 0"):
            assert not torch.allclose(before[result], after[result]), (name, result)


def test_position_ids_shift_together():
    """Rotation is relative: positions that start at 7 change nothing."""
    case = Case()
    before = case.ours(case.qkv)
    case.position_ids = case.position_ids + 7
    torch.testing.assert_close(case.ours(case.qkv), before, atol=2e-5, rtol=1e-5)


def test_strided_input():
    case = Case()
    wide = torch.randn(len(case.qkv), case.qkv.shape[1] + 5)
    for qkv in (wide[:, 2:-3], wide[:, 2:-3].t().contiguous().t()):
        strided, plain = (results(case.ours, (x.requires_grad_(),)) for x in (qkv, qkv.clone()))
        assert all(torch.equal(strided[name], plain[name]) for name in plain)


def test_same_bits():
    case = Case()
    assert_same_bits(case.ours, (case.qkv,))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("lengths", ([47, 48, 49, 97, 400], [20] * 9, [500]))
def test_lengths_around_the_tiles(lengths, causal):
    for heads in ((2, 1, 32), (1, 1, 6), (1, 1, 72)):
        case = Case(lengths, heads, causal)
        compare(case.ours, case.hugging_face, (case.qkv,), torch.float32)


def test_the_number_of_threads_does_not_matter(backend):
    if backend != "cpu":
        pytest.skip("the other backends have equal bits for one number of threads only")
    case, before = Case(heads=(4, 2, 32)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(case.ours, (case.qkv,)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_positions_beyond_the_tables(backend):
    if backend not in ("reference", "cpu"):
        pytest.skip("on a GPU the check would synchronise")
    case = Case()
    case.position_ids = case.position_ids + len(case.cos)
    with pytest.raises((RuntimeError, IndexError), match="position_ids|out of range"):
        case.ours(case.qkv)


@pytest.mark.parametrize("attention", ("rotary", "full"))
def test_no_gradient_of_logsumexp_is_made(attention):
    """Autograd would write zeros for it in every layer's backward pass."""
    case, filled = Case(), []  # shapes

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zero_):
                filled.append(tuple(out.shape))
            return out

    if attention == "full":
        qkv = torch.randn(sum(LENGTHS), 3 * 2 * 16, requires_grad=True)
        out, heads = full_attention(qkv, offsets(LENGTHS), max(LENGTHS), 2), 2
    else:
        out, heads = case.ours(case.qkv), case.num_heads
    with Zeros():
        out.sum().backward()
    assert (sum(LENGTHS), heads) not in filled


def test_form_for_other_devices():
    """Away from the CPU the reference computes attention eagerly: the same results in fp64."""
    q = torch.randn(2, 6, 9, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 4, dtype=torch.float64)
    grad = torch.randn_like(q)
    for causal in (True, False):
        fused, eager = (
            attend(q, k, v, causal) for attend in (reference.attention, reference.eager_attention)
        )
        torch.testing.assert_close(fused, eager)
        gradients = (
            backward(grad, q, k, v, *fused, causal)
            for backward in (reference.attention_bwd, reference.eager_attention_bwd)
        )
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv": 3}, "columns of qkv"),
        ({"position_ids": lambda: torch.arange(5)}, r"position_ids has shape \(5,\).*\(243, 128\)"),
        ({"cos": lambda: torch.ones(9, 4)}, r"cos has shape \(9, 4\).*\(9, 8\)"),
        ({"cos": lambda: torch.ones(260, 8).double()}, "float64"),
        ({"position_ids": lambda: torch.ones(243)}, "int32 or int64"),
    ],
)
def test_wrong_arguments(change, words):
    case = Case(heads=(4, 2, 16))
    for name, value in change.items():
        setattr(case, name, value() if callable(value) else value)
    with pytest.raises(ValueError, match=words):
        case.ours(case.qkv)


def test_offsets_that_do_not_fit(backend):
    if backend != "reference" and torch.cuda.is_available():
        pytest.skip("on a GPU the check would synchronise")
    case = Case(heads=(4, 2, 16))
    case.lengths = [200]
    with pytest.raises(ValueError, match="increase from 0 to 243"):
        case.ours(case.qkv)
    with pytest.raises(ValueError, match="max_seqlen is 3, but a sample has 5"):
        full_attention(torch.ones(5, 12), offsets([5]), 3, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", ([50] * 3, [1, 30, 7]))
def test_full_attention_equals_clip(lengths, dtype):
    module = CLIPAttention(CLIPVisionConfig(hidden_size=128, num_attention_heads=2))
    module.config._attn_implementation = "eager"
    # its three projections pick our q, k and v out of the input
    weights = {f"{name}_proj.bias": torch.zeros(128) for name in ("q", "k", "v", "out")}
    weights |= {
        f"{name}_proj.weight": part
        for name, part in zip("qkv", torch.eye(384).split(128), strict=True)
    }
    weights["out_proj.weight"] = torch.eye(128)

    def ours(qkv):
        return full_attention(qkv, offsets(lengths), max(lengths), 2)

    def clip(qkv):
        mask = block_mask(lengths, False, qkv.dtype)
        if qkv.dtype == torch.float64:
            q, k, v = qkv.unflatten(1, (3, 2, 64)).permute(1, 2, 0, 3)[:, None]
            return plain_attention(q, k, v, mask)
        state = {name: x.to(qkv.dtype) for name, x in weights.items()}
        return torch.func.functional_call(module, state, (qkv[None], mask))[0][0]

    compare(ours, clip, (torch.randn(sum(lengths), 384, requires_grad=True),), dtype)


def test_full_attention_gradcheck(backend):
    qkv = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: full_attention(x, offsets([2, 1, 3]), 3, 2), (qkv,), fast_mode=backend == "triton"
    )


def test_no_images():
    found = results(
        lambda qkv: full_attention(qkv, offsets([]), 0, 2), (torch.ones(0, 12).requires_grad_(),)
    )
    assert found["output 0"].shape == (0, 4) and found["gradient 0"].shape == (0, 12)
