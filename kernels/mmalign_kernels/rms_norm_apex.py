"""RMSNorm by NVIDIA's apex.

It has no residual addition, which is a pass of its own, forward and backward, and no gradient of
the input alone: that of a frozen weight is computed, too, and dropped.
"""

import fused_layer_norm_cuda
from torch import Tensor

from .libraries import check


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check("apex", "rms_norm", x)
    y, rstd = fused_layer_norm_cuda.rms_forward_affine(
        x.contiguous(), list(weight.shape), weight.contiguous(), eps
    )
    return y, rstd[:, None]


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check("apex", "add_rms_norm", x)
    residual = x + residual
    y, rstd = rms_norm_fwd(residual, weight, eps)
    return y, residual, rstd


def rms_norm_bwd(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    check("apex", "rms_norm", x)
    eps, memory_efficient = 0.0, False  # x was kept, so eps is not read
    grad_x, grad_weight = fused_layer_norm_cuda.rms_backward_affine(
        grad_y.contiguous(),
        rstd.flatten(),
        x.contiguous(),
        list(weight.shape),
        weight.contiguous(),
        eps,
        memory_efficient,
    )
    if grad_residual is not None:
        grad_x += grad_residual
    return grad_x, grad_weight if needs_weight else weight.new_empty(0)
