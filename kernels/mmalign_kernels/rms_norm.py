"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, alone or after the residual addition.

Zhang and Sennrich 2019 (arXiv 1910.07467). Plain PyTorch: reference/rms_norm.py. Arithmetic in fp32
(fp64 for fp64 input), rounded once at the end. Saved for the backward pass: the norm's input and
rstd.
"""

from typing import Any

from torch import Tensor

from .operation import (
    check_floats,
    check_rank,
    check_shape,
    differentiable,
    empty_statistics,
    operation,
)


@operation
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and rstd (num_rows, 1)."""
    return x.new_empty(x.shape), empty_statistics(x)


@operation
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, new_residual and rstd (num_rows, 1)."""
    return x.new_empty(x.shape), x.new_empty(x.shape), empty_statistics(x)


@operation
def rms_norm_bwd(
    grad_y: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx plus grad_residual, the gradient that bypasses the norm, and dweight (or empty)."""
    return x.new_empty(x.shape), weight.new_empty(
        weight.shape
    ) if needs_weight else weight.new_empty(0)


def _save_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, rstd = output
    ctx.save_for_backward(inputs[0], inputs[1], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple:
    if grad_y is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = rms_norm_bwd(grad_y, None, x, weight, rstd, needs_weight)
    return grad_x, grad_weight if needs_weight else None, None


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, new_residual, rstd = output
    ctx.save_for_backward(new_residual, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_norm_backward(
    ctx: Any, grad_y: Tensor | None, grad_residual: Tensor | None, _: None
) -> tuple:
    if grad_y is None:
        return grad_residual, grad_residual, None, None
    new_residual, weight, rstd = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[2]
    grad_x, grad_weight = rms_norm_bwd(
        grad_y, grad_residual, new_residual, weight, rstd, needs_weight
    )
    return grad_x, grad_x, grad_weight if needs_weight else None, None


_rms_norm = differentiable(rms_norm_fwd, _save_norm, _norm_backward)
_add_rms_norm = differentiable(add_rms_norm_fwd, _save_add_norm, _add_norm_backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x (num_rows, hidden_size), weight (hidden_size,) of the same dtype -> y like x.
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    check_rank("rms_norm", 2, x=x)
    check_shape("rms_norm", x.shape[1:], lambda: f"x {tuple(x.shape)}", weight=weight)
    check_floats("rms_norm", x=x, weight=weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """new_residual = x + residual; y = rms_norm(new_residual, weight, eps).

    x, residual (num_rows, hidden_size), weight (hidden_size,) of one dtype -> (y, new_residual),
    both like x. The sum is rounded to the type of x before the norm reads it. The backward pass
    adds the gradient of new_residual to that of the norm. Raises ValueError as rms_norm does.
    """
    check_rank("add_rms_norm", 2, x=x)
    check_shape("add_rms_norm", x.shape, lambda: f"x {tuple(x.shape)}", residual=residual)
    check_shape("add_rms_norm", x.shape[1:], lambda: f"x {tuple(x.shape)}", weight=weight)
    check_floats("add_rms_norm", x=x, residual=residual, weight=weight)
    y, new_residual, _ = _add_rms_norm(x, residual, weight, eps)
    return y, new_residual
