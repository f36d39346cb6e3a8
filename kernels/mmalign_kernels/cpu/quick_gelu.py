"""Quick GELU by csrc/cpu/quick_gelu.cpp."""

import torch
from torch import Tensor

from ..reference import quick_gelu as reference
from .library import operation


def quick_gelu_fwd(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return reference.quick_gelu_fwd(x)
    return operation("quick_gelu_fwd")(x.contiguous())


def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return reference.quick_gelu_bwd(grad_y, x)
    return operation("quick_gelu_bwd")(grad_y.contiguous(), x.contiguous())
