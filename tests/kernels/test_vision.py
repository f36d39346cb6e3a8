"""LayerNorm against torch.nn.LayerNorm, quick GELU against transformers' activation."""

import pytest
import torch
from mmalign_kernels import layer_norm, quick_gelu
from torch import nn
from transformers.activations import ACT2FN

from .close import assert_same_bits, compare, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def our_layer_norm(x, weight, bias):
    return layer_norm(x, weight, bias, 1e-5)


def torch_layer_norm(x, weight, bias):
    module = nn.LayerNorm(x.shape[1])
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 40), (199, 1024)))
def test_layer_norm_equals_torch(shape, dtype):
    x = 3 * torch.randn(shape) + torch.randn(shape[0], 1)
    inputs = (x, 1 + torch.randn(shape[1]) / 4, torch.randn(shape[1]))
    compare(our_layer_norm, torch_layer_norm, tuple(y.requires_grad_() for y in inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu_equals_hugging_face(dtype):
    compare(quick_gelu, ACT2FN["quick_gelu"], (3 * torch.randn(199, 64).requires_grad_(),), dtype)


def test_gradcheck():
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), 5, 5)
    )
    torch.autograd.gradcheck(our_layer_norm, (x, weight, bias))
    torch.autograd.gradcheck(quick_gelu, (x,))


def test_strided_input():
    for x in (torch.randn(20, 11)[:, 1:9], torch.randn(8, 20).t()):
        weight, bias = torch.randn(2, 8)
        for function, rest in ((our_layer_norm, (weight, bias)), (quick_gelu, ())):
            strided, plain = (
                results(function, (y.detach().requires_grad_(), *rest)) for y in (x, x.clone())
            )
            for name, value in plain.items():
                torch.testing.assert_close(strided[name], value)


def test_same_bits():
    x, weight, bias = torch.randn(199, 64, requires_grad=True), torch.randn(64), torch.randn(64)
    assert_same_bits(our_layer_norm, (x, weight, bias))
    assert_same_bits(quick_gelu, (x,))


def test_wrong_arguments():
    with pytest.raises(
        ValueError, match=r"bias has shape \(7,\), expected \(8,\) beside x \(3, 8\)"
    ):
        layer_norm(torch.ones(3, 8), torch.ones(8), torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="int64"):
        quick_gelu(torch.ones(3).long())
