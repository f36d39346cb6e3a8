"""LayerNorm with bias against torch.nn.LayerNorm."""

import pytest
import torch
from mmalign_kernels import layer_norm
from torch import nn

from .accuracy import assert_same_bits, compare, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ours(x, weight, bias):
    return layer_norm(x, weight, bias, 1e-5)


def theirs(x, weight, bias):
    module = nn.LayerNorm(x.shape[1])
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 40), (199, 1024)))
def test_equals_torch(shape, dtype):
    x = 3 * torch.randn(shape) + torch.randn(shape[0], 1)
    inputs = (x, 1 + torch.randn(shape[1]) / 4, torch.randn(shape[1]))
    compare(ours, theirs, tuple(y.requires_grad_() for y in inputs), dtype)


def test_gradcheck():
    shapes = ((3, 5), 5, 5)
    inputs = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    torch.autograd.gradcheck(ours, tuple(inputs))


def test_strided_input():
    weight, bias = torch.randn(2, 8)
    for x in (torch.randn(20, 11)[:, 1:9], torch.randn(8, 20).t()):
        strided, plain = (
            results(ours, (y.detach().requires_grad_(), weight, bias)) for y in (x, x.clone())
        )
        torch.testing.assert_close(strided, plain)


def test_same_bits():
    x = torch.randn(199, 64, requires_grad=True)
    assert_same_bits(ours, (x, torch.randn(64), torch.randn(64)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\) for x \(3, 8\)"):
        layer_norm(torch.ones(3, 8), torch.ones(8), torch.ones(7), 1e-5)
