"""SwiGLU by csrc/cpu/swiglu.cpp."""

import torch
from torch import Tensor

from ..reference import swiglu as reference
from .library import operation


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    if gate_up.dtype != torch.float32:
        return reference.swiglu_fwd(gate_up)
    return operation("swiglu_fwd")(gate_up.contiguous())


def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    if gate_up.dtype != torch.float32:
        return reference.swiglu_bwd(grad_y, gate_up)
    grad = gate_up.new_empty(gate_up.shape)
    operation("swiglu_bwd")(grad_y.contiguous(), gate_up.contiguous(), grad)
    return grad


def swiglu_bwd_in_place(grad_y: Tensor, gate_up: Tensor) -> None:
    if gate_up.dtype != torch.float32:
        return reference.swiglu_bwd_in_place(grad_y, gate_up)
    operation("swiglu_bwd")(grad_y.contiguous(), gate_up, gate_up)
