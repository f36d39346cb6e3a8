"""RMSNorm by csrc/cpu/rms_norm.cpp."""

import torch
from torch import Tensor

from ..reference import rms_norm as reference
from .library import operation


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.rms_norm_fwd(x, weight, eps)
    return operation("rms_norm_fwd")(x.contiguous(), weight.contiguous(), eps)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.add_rms_norm_fwd(x, residual, weight, eps)
    inputs = x.contiguous(), residual.contiguous(), weight.contiguous()
    return operation("add_rms_norm_fwd")(*inputs, eps)


def rms_norm_bwd(
    grad_y: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype != torch.float32:
        return reference.rms_norm_bwd(grad_y, grad_residual, x, weight, rstd, needs_weight)
    bypass = None if grad_residual is None else grad_residual.contiguous()
    inputs = x.contiguous(), weight.contiguous(), rstd.contiguous()
    return operation("rms_norm_bwd")(grad_y.contiguous(), bypass, *inputs, needs_weight)
