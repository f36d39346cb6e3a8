"""RMSNorm against transformers' LlamaRMSNorm."""

import pytest
import torch
from mmalign_kernels import add_rms_norm, rms_norm
from mmalign_kernels.operation import Operation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .accuracy import assert_same_bits, compare, results

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 8), (199, 3200), (700, 64))


def hugging_face_norm(x, weight):
    norm = LlamaRMSNorm(len(weight), EPS)
    # the module widens to fp32 at most: fp64 is spelled out
    if x.dtype == torch.float64:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def hugging_face_add_norm(x, residual, weight):
    residual = residual + x
    return hugging_face_norm(residual, weight), residual


def our_norm(x, weight):
    return rms_norm(x, weight, EPS)


def our_add_norm(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def rows(*shape, spread=True):
    """Rows of very different size, as hidden states are."""
    scale = torch.logspace(-2, 2, shape[0])[:, None] if spread else 1
    return (torch.randn(shape) * scale).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_hugging_face(shape, dtype):
    weight = (1 + torch.randn(shape[1]) / 4).requires_grad_()
    compare(our_norm, hugging_face_norm, (rows(*shape), weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_equals_hugging_face(shape, dtype):
    weight = (1 + torch.randn(shape[1]) / 4).requires_grad_()
    inputs = (rows(*shape), rows(*shape, spread=False), weight)
    compare(our_add_norm, hugging_face_add_norm, inputs, dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weight_gradient_of_many_rows(dtype):
    weight = torch.ones(64, requires_grad=True)
    compare(our_norm, hugging_face_norm, (torch.randn(16384, 64), weight), dtype)


def test_gradcheck():
    x, residual = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(our_norm, (x, weight))
    torch.autograd.gradcheck(our_add_norm, (x, residual, weight))


def test_frozen_weight_costs_nothing(monkeypatch):
    calls = {}
    run = Operation.run
    monkeypatch.setattr(
        Operation, "run", lambda self, *args: calls.update({self.name: args}) or run(self, *args)
    )
    x, weight = rows(600, 16), torch.ones(16)
    frozen = results(our_norm, (x, weight))
    assert calls["rms_norm_bwd"][-1] is False and "gradient 1" not in frozen
    trained = results(our_norm, (x, weight.requires_grad_()))
    assert calls["rms_norm_bwd"][-1] is True
    torch.testing.assert_close(frozen["gradient 0"], trained["gradient 0"])


def test_one_of_two_outputs_unused():
    inputs = (rows(7, 16), rows(7, 16), torch.ones(16))
    inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    for used in (0, 1):
        ours = torch.autograd.grad(
            our_add_norm(*inputs)[used].square().sum(), inputs, allow_unused=True
        )
        theirs = torch.autograd.grad(
            hugging_face_add_norm(*inputs)[used].square().sum(), inputs, allow_unused=True
        )
        for our, their in zip(ours, theirs, strict=True):
            assert (our is None) == (their is None)
            if our is not None:
                torch.testing.assert_close(our, their)


def test_no_rows():
    found = results(
        our_norm, (torch.ones(0, 8, requires_grad=True), torch.ones(8).requires_grad_())
    )
    assert found["output 0"].shape == (0, 8) and not found["gradient 1"].any()


def test_strided_input():
    wide = torch.randn(40, 33)
    weight = torch.randn(16, requires_grad=True)
    for x in (wide[:, 1:17], torch.randn(16, 40).t(), torch.randn(1, 16).expand(40, 16)):
        strided, plain = (results(our_norm, (y.requires_grad_(), weight)) for y in (x, x.clone()))
        assert all(torch.equal(strided[name], plain[name]) for name in plain)


def test_same_bits():
    inputs = (rows(199, 64), rows(199, 64), torch.randn(64, requires_grad=True))
    assert_same_bits(our_add_norm, inputs)


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(3, 8), torch.ones(9), (r"\(9,\)", r"\(3, 8\)")),
        (torch.ones(3, 8), torch.ones(8, dtype=torch.bfloat16), ("bfloat16", "float32")),
        (torch.ones(3, 8).int(), torch.ones(8), ("int32",)),
        (torch.ones(2, 3, 8), torch.ones(8), (r"\(2, 3, 8\)", "2 dimensions")),
    ],
)
def test_wrong_arguments(x, weight, words):
    for word in words:
        with pytest.raises(ValueError, match=word):
            rms_norm(x, weight, EPS)


def test_wrong_residual():
    with pytest.raises(ValueError, match=r"residual has shape \(4, 8\).*\(3, 8\)"):
        add_rms_norm(torch.ones(3, 8), torch.ones(4, 8), torch.ones(8), EPS)
