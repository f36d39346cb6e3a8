"""Quick GELU, the activation of the CLIP tower. Plain PyTorch: reference/quick_gelu.py."""

from typing import Any

from torch import Tensor

from .operation import check_floats, differentiable, operation


@operation
def quick_gelu_fwd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation
def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return quick_gelu_bwd(grad_y, ctx.saved_tensors[0])


_quick_gelu = differentiable(quick_gelu_fwd, _save, _backward)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP; any shape."""
    check_floats("quick_gelu", x=x)
    return _quick_gelu(x)
