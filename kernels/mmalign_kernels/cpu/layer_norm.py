"""LayerNorm by csrc/cpu/layer_norm.cpp."""

import torch
from torch import Tensor

from ..reference import layer_norm as reference
from .library import operation


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.float32:
        return reference.layer_norm_fwd(x, weight, bias, eps)
    return operation("layer_norm_fwd")(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.layer_norm_bwd(grad_y, x, weight, eps)
    inputs = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    return operation("layer_norm_bwd")(*inputs, eps)
