"""SwiGLU against transformers' LlamaMLP."""

import pytest
import torch
from mmalign_kernels import swiglu
from mmalign_kernels.reference import swiglu as reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from .accuracy import assert_same_bits, compare, results


def hugging_face(gate_up):
    """LlamaMLP whose projections pick gate and up out of the input and leave the rest alone."""
    columns = gate_up.shape[1] // 2
    size = {"hidden_size": 2 * columns, "intermediate_size": columns}
    mlp = LlamaMLP(LlamaConfig(**size, num_attention_heads=1))
    picks = torch.eye(2 * columns, dtype=gate_up.dtype)
    weights = {
        "gate_proj.weight": picks[:columns],
        "up_proj.weight": picks[columns:],
        "down_proj.weight": picks[:, :columns],
    }
    return torch.func.functional_call(mlp, weights, (gate_up,))[:, :columns]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("shape", ((1, 6), (199, 344)))
def test_swiglu_equals_hugging_face(shape, dtype):
    gate_up = 3 * torch.randn(shape)
    compare(swiglu, hugging_face, (gate_up.requires_grad_(),), dtype)


def test_gradcheck():
    torch.autograd.gradcheck(swiglu, (torch.randn(3, 8, dtype=torch.float64, requires_grad=True),))


def test_extreme_gates():
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    found = results(swiglu, (torch.cat((gate, torch.ones(1, 5)), 1).requires_grad_(),))
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close(found["output 0"], gate.clamp(min=0))


def test_strided_input():
    wide = torch.randn(20, 11)
    for x in (wide[:, 1:9], torch.randn(8, 20).t()):
        strided, plain = (results(swiglu, (y.requires_grad_(),)) for y in (x, x.clone()))
        assert all(torch.equal(strided[name], plain[name]) for name in plain)


def test_same_bits():
    assert_same_bits(swiglu, (torch.randn(199, 64, requires_grad=True),))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"\(3, 7\) has an odd number of columns"):
        swiglu(torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"\(2, 3, 8\), expected 2 dimensions"):
        swiglu(torch.ones(2, 3, 8))


# the gradient written over the input


def through(x, weight, overwrite):
    """Gradients by x and weight of a product and swiglu; where gate_up lies, and its gradient."""
    x, weight = (y.detach().requires_grad_() for y in (x, weight))
    gate_up, places = x @ weight.t(), []
    gate_up.register_hook(lambda grad: places.append(grad.data_ptr()))
    swiglu(gate_up, overwrite).square().sum().backward()
    return x.grad, weight.grad, gate_up, places[0] == gate_up.data_ptr()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_overwriting_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(reference, "_CACHED_ELEMENTS", 1000)  # several parts
    x, weight = torch.randn(67, 24).to(dtype), torch.randn(2 * 90, 24).to(dtype) / 4
    *plain, before, same_place = through(x, weight, False)
    assert not same_place and torch.equal(before, x @ weight.t())
    *overwritten, after, same_place = through(x, weight, True)
    assert same_place and not torch.equal(before, after)
    assert all(torch.equal(*pair) for pair in zip(plain, overwritten, strict=True))


class Allocated(TorchDispatchMode):
    """Elements of the largest tensor made inside the block."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("backend", ("reference",), indirect=True)
def test_overwriting_allocates_nothing(monkeypatch):
    """Triton's interpreter would copy its arguments."""
    monkeypatch.setattr(reference, "_CACHED_ELEMENTS", 1000)
    largest = []
    for overwrite in (False, True):
        gate_up = torch.randn(64, 400, requires_grad=True) * 1
        y = swiglu(gate_up, overwrite)
        grad_y = torch.ones_like(y)
        with Allocated() as allocated:
            torch.autograd.grad(y, gate_up, grad_y)
        largest.append(allocated.largest)
    assert largest[0] == 64 * 400 and largest[1] <= 1000


def test_second_backward_pass_over_overwritten_input():
    gate_up = torch.randn(3, 8, requires_grad=True) * 1
    y = swiglu(gate_up, overwrite=True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass needs gate_up"):
        y.sum().backward()


def test_overwriting_what_another_operation_has_kept():
    gate_up = torch.randn(3, 8, requires_grad=True).tanh()  # its backward pass reads its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        swiglu(gate_up, overwrite=True).sum().backward()


def test_leaves_are_not_overwritten():
    leaf = torch.randn(3, 8, requires_grad=True)
    for x in (leaf, leaf.view(3, 8)):
        with pytest.raises(ValueError, match=r"\(3, 8\) is a leaf"):
            swiglu(x, overwrite=True)
    with torch.no_grad():
        assert torch.equal(swiglu(leaf, overwrite=True), swiglu(leaf))


def test_strided_input_is_not_overwritten():
    gate_up = (torch.randn(8, 3, requires_grad=True) * 1).t()
    before = gate_up.clone()
    swiglu(gate_up, overwrite=True).sum().backward()
    assert torch.equal(gate_up, before)


def test_overwriting_recomputed_input():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)

    def block(x):
        return swiglu(x @ weight.t(), overwrite=True)

    plain = torch.autograd.grad(block(x).square().sum(), (x, weight))
    again = checkpoint(block, x, use_reentrant=False)
    recomputed = torch.autograd.grad(again.square().sum(), (x, weight))
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))


def test_compiled_graphs_overwrite_nothing():
    def block(x):
        gate_up = x * 2
        return swiglu(gate_up, overwrite=True), gate_up

    x = torch.randn(5, 8, requires_grad=True)
    y, gate_up = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gate_up, 2 * x)
    assert torch.equal(grad, torch.autograd.grad(block(x)[0].sum(), x)[0])
