"""SwiGLU in plain PyTorch."""

import torch
from torch import Tensor

aten = torch.ops.aten
_CACHED_ELEMENTS = 1 << 18  # of each of the five matrices in the gradient


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    y = gate_up.new_empty(gate.shape)
    return aten.silu.out(gate, out=y).mul_(up)


def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    grad = gate_up.new_empty(gate_up.shape)
    grad_gate, grad_up = grad.chunk(2, 1)
    torch.mul(grad_y, up, out=grad_up)  # holds an intermediate, overwritten below
    aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
    aten.silu.out(gate, out=grad_up).mul_(grad_y)
    return grad


def swiglu_bwd_in_place(grad_y: Tensor, gate_up: Tensor) -> None:
    """Blocks of rows, so that what the passes share stays in the cache, without new pages."""
    rows = max(_CACHED_ELEMENTS // max(grad_y.shape[1], 1), 1)
    for part, dy in zip(gate_up.split(rows), grad_y.split(rows), strict=True):
        gate, up = part.chunk(2, 1)
        grad_up = aten.silu(gate).mul_(dy)
        aten.silu_backward.grad_input(up.mul_(dy), gate, grad_input=gate)
        up.copy_(grad_up)
