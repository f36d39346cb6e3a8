"""Matrix products against torch.nn.functional.linear."""

import pytest
import torch
import torch.nn.functional as F
from mmalign_kernels import adding_to_gradients, linear
from mmalign_kernels.cpu import library as cpu_library
from mmalign_kernels.reference import linear as products
from mmalign_kernels.reference.linear import WeightGradient, product, weight_gradient

from .accuracy import assert_same_bits, compare, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# rows, in_features, out_features: below and above the size at which a library is chosen
SHAPES = ((0, 8, 6), (1, 8, 6), (199, 100, 130), (1, 1200, 900), (199, 130, 100))


def inputs(rows, in_features, out_features, bias=True):
    shapes = ((rows, in_features), (out_features, in_features), (out_features,))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return (*tensors[:2], tensors[2] if bias else None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Large begins where the tests are quick."""
    monkeypatch.setattr(products, "_SMALL", 1 << 20)


def test_shapes_are_on_both_sides():
    sizes = [rows * columns * out for rows, columns, out in SHAPES]
    assert min(sizes) < products._SMALL < max(sizes)


@pytest.mark.parametrize("built", (True, False))
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_gradient_of_a_weight(shape, built, monkeypatch):
    """Also without csrc/cpu, and from matrices that are not contiguous."""
    if not built:
        monkeypatch.setattr(cpu_library, "missing", lambda: "not built")
    rows, in_features, out_features = shape
    grad, x = torch.randn(out_features, rows).t(), torch.randn(rows, in_features + 3)[:, 3:]
    found = weight_gradient(grad, x)
    assert found.shape == (out_features, in_features)
    torch.testing.assert_close(found, grad.t() @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("built", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_weight_over_chunks(shape, built, monkeypatch):
    if not built:
        monkeypatch.setattr(cpu_library, "missing", lambda: "not built")
    rows, in_features, out_features = shape
    grad, x = torch.randn(rows, out_features), torch.randn(rows, in_features)
    total = WeightGradient(torch.empty(out_features, in_features), torch.float32)
    for part in (slice(0, rows - 3), slice(rows - 3, rows)) if rows > 3 else ():
        total.add(grad[part], x[part])
    expected = grad.t() @ x if rows > 3 else torch.zeros(out_features, in_features)
    assert total.total().is_contiguous()
    torch.testing.assert_close(total.total(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(cpu_library.missing() is not None, reason="csrc/cpu is not built")
@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (1, 900), (16, 16), (33, 17), (199, 100)))
def test_transpose(shape):
    x = torch.randn(shape)
    found = cpu_library.operation("transpose")(x)
    assert found.is_contiguous() and torch.equal(found, x.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, bias, dtype):
    compare(linear, F.linear, inputs(*shape, bias), dtype)


def test_more_dimensions():
    x, weight, bias = inputs(199, 100, 130)
    found, expected = (results(f, (x.view(1, 199, 100), weight, bias)) for f in (linear, F.linear))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", (0, 1, 2))
def test_frozen_argument_gets_no_gradient(frozen):
    tensors = list(inputs(199, 100, 130))
    tensors[frozen] = tensors[frozen].detach()
    found, expected = (results(f, tuple(tensors)) for f in (linear, F.linear))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_strided_operands():
    a, b = torch.randn(150, 210), torch.randn(140, 210)
    views = (a, a.t().contiguous().t(), torch.randn(150, 215)[:, 3:-2], a[:1].expand(150, 210))
    for x in views:
        for weight in (b, b.t().contiguous().t()):
            torch.testing.assert_close(product(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-4)
    x, weight = a.requires_grad_(), b.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), x)  # a gradient without memory
    torch.testing.assert_close(grad, b.sum(0).expand_as(a), rtol=1e-5, atol=1e-4)


def test_inputs_are_left_alone():
    assert_same_bits(linear, inputs(199, 100, 130))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_added_by_their_product(shape, dtype):
    """Of three micro-batches, against the sum in fp64; in 16 bits rounded less often."""
    batches = [inputs(*shape) for _ in range(3)]
    weight, exact = batches[0][1].detach(), torch.zeros(shape[:0:-1], dtype=torch.float64)
    added, separate = (weight.to(dtype).requires_grad_() for _ in range(2))
    for x, _, bias in batches:
        x, bias = (a.detach().to(dtype).requires_grad_() for a in (x, bias))
        grad = torch.randn(shape[0], shape[2]).to(dtype)
        exact += grad.double().t() @ x.detach().double()
        linear(x, separate, bias).backward(grad)
        by_autograd = x.grad, bias.grad
        x.grad = bias.grad = None
        with adding_to_gradients():
            linear(x, added, bias).backward(grad)
        torch.testing.assert_close((x.grad, bias.grad), by_autograd)
    errors = [(w.grad.double() - exact).norm() for w in (added, separate)]
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps * exact.norm()


def test_gradients_are_added_in_place_where_a_weight_is_a_parameter():
    x, weight, _ = inputs(20, 8, 6)
    with adding_to_gradients():
        linear(x, weight).sum().backward()
        first = weight.grad
        expected = 2 * first
        linear(x, weight).sum().backward()
        assert weight.grad is first
        torch.testing.assert_close(first, expected)
        linear(x, weight[:4]).sum().backward()  # a part, whose gradient autograd puts together
    torch.testing.assert_close(first[:4], 3 * expected[:4] / 2)


def test_compiles():
    arguments = inputs(199, 100, 130)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), linear(*arguments), rtol=1e-5, atol=1e-4)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"x \(3, 8\) and weight \(6, 9\)"):
        linear(torch.ones(3, 8), torch.ones(6, 9))
    with pytest.raises(ValueError, match="bias is torch.float64"):
        linear(torch.ones(3, 8), torch.ones(6, 8), torch.ones(6).double())
