"""LayerNorm with bias, as in the CLIP tower. Plain PyTorch: reference/layer_norm.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .operation import check_floats, check_rank, check_shape, differentiable, is_traced, operation


@operation
def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operation
def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; the statistics are recomputed."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[3]


def _backward(ctx: Any, grad_y: Tensor) -> tuple:
    return *layer_norm_bwd(grad_y, *ctx.saved_tensors, ctx.eps), None


_layer_norm = differentiable(layer_norm_fwd, _save, _backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, as nn.LayerNorm.

    x (num_rows, hidden_size), weight and bias (hidden_size,) of the same dtype -> like x.
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    if _is_torchs(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    check_rank("layer_norm", 2, x=x)
    check_shape("layer_norm", x.shape[1:], lambda: f"x {tuple(x.shape)}", weight=weight, bias=bias)
    check_floats("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)


def _is_torchs(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Valid arguments in fp32 on a CPU, where PyTorch is fastest: its gradient needs no Python."""
    if not (x.is_cpu and weight.is_cpu and bias.is_cpu) or is_traced(x):
        return False
    is_fp32 = x.dtype == weight.dtype == bias.dtype == torch.float32
    has_rows = x.dim() == 2 and weight.shape == bias.shape == x.shape[1:]
    return is_fp32 and has_rows and dispatch.forced_backend() in (None, "cpu")
