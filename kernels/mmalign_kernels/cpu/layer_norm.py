"""LayerNorm by PyTorch's own kernels, which are not in its plain form for the gradient."""

import torch
from torch import Tensor

from ..reference import layer_norm as reference
from ..reference.layer_norm import layer_norm_fwd

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]
aten = torch.ops.aten


def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.layer_norm_bwd(grad_y, x, weight, eps)
    x, shape = x.contiguous(), list(x.shape[1:])
    _, mean, rstd = aten.native_layer_norm(x, shape, None, None, eps)
    return aten.native_layer_norm_backward(
        grad_y.contiguous(), x, shape, mean, rstd, weight, weight, [True] * 3
    )
