"""LayerNorm with bias, as in the CLIP tower. Plain PyTorch: reference/layer_norm.py."""

from typing import Any

from torch import Tensor

from .operation import check_floats, check_rank, check_shape, differentiable, operation


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
    check_rank("layer_norm", 2, x=x)
    check_shape("layer_norm", x.shape[1:], lambda: f"x {tuple(x.shape)}", weight=weight, bias=bias)
    check_floats("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)
