"""SwiGLU against transformers' LlamaMLP."""

import pytest
import torch
from mmalign_kernels import swiglu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from .close import assert_same_bits, compare, results


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
