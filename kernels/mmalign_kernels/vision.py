"""What the CLIP tower needs beside attention: LayerNorm with bias and the quick GELU."""

from typing import Any

from torch import Tensor

from .checks import check_floats, check_rank, check_shape
from .operation import differentiable, operation


@operation
def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operation
def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; the statistics are computed again."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@operation
def quick_gelu_fwd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation
def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep_layer_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.eps = inputs[3]


def _layer_norm_backward(ctx: Any, grad_y: Tensor) -> tuple:
    return *layer_norm_bwd(grad_y, *ctx.saved_tensors, ctx.eps), None


def _keep_input(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _quick_gelu_backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return quick_gelu_bwd(grad_y, ctx.saved_tensors[0])


_layer_norm = differentiable(layer_norm_fwd, _keep_layer_norm, _layer_norm_backward)
_quick_gelu = differentiable(quick_gelu_fwd, _keep_input, _quick_gelu_backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, as nn.LayerNorm.

    x (num_rows, hidden_size), weight and bias (hidden_size,) of the same type -> like x.
    Raises ValueError where shapes, types or devices do not fit.
    """
    check_rank("layer_norm", 2, x=x)
    check_shape("layer_norm", x.shape[1:], f"x {tuple(x.shape)}", weight=weight, bias=bias)
    check_floats("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP; any shape."""
    check_floats("quick_gelu", x=x)
    return _quick_gelu(x)
