"""Quick GELU against transformers' activation."""

import pytest
import torch
from mmalign_kernels import quick_gelu
from transformers.activations import ACT2FN

from .accuracy import assert_same_bits, compare, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_hugging_face(dtype):
    compare(quick_gelu, ACT2FN["quick_gelu"], (3 * torch.randn(199, 64).requires_grad_(),), dtype)


def test_gradcheck():
    torch.autograd.gradcheck(quick_gelu, (torch.randn(3, 5).double().requires_grad_(),))


def test_strided_input():
    for x in (torch.randn(20, 11)[:, 1:9], torch.randn(8, 20).t()):
        strided, plain = (
            results(quick_gelu, (y.detach().requires_grad_(),)) for y in (x, x.clone())
        )
        torch.testing.assert_close(strided, plain)


def test_same_bits():
    assert_same_bits(quick_gelu, (torch.randn(199, 64, requires_grad=True),))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="int64"):
        quick_gelu(torch.ones(3).long())
