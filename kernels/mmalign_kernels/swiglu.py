"""SwiGLU: silu(gate) * up, Shazeer 2020 (arXiv 2002.05202). Plain PyTorch: reference/swiglu.py.

Gate and up are the halves of one row, as one matrix product writes them. Saved for the backward
pass: only the input; its silu is recomputed. If the caller allows it, the gradient overwrites the
input, so the backward pass allocates nothing of that size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import dispatch
from .operation import (
    check_floats,
    check_rank,
    differentiable,
    is_traced,
    mutating,
    once,
    operation,
)


@operation
def swiglu_fwd(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@operation
def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


@mutating("gate_up")
def swiglu_bwd_in_place(grad_y: Tensor, gate_up: Tensor) -> None:
    """Overwrites a contiguous gate_up with its gradient."""


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return swiglu_bwd(grad_y, ctx.saved_tensors[0])


_swiglu = differentiable(swiglu_fwd, _save, _backward)


class _Overwriting(torch.autograd.Function):
    """For eager calls: a compiled graph plans its own memory."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.backend, ctx.overwritten = dispatch.forced_backend(), False
        ctx.save_for_backward(gate_up)
        return swiglu_fwd.run(gate_up)

    @staticmethod
    @once
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        if ctx.overwritten:
            raise RuntimeError(
                "swiglu: a second backward pass needs gate_up, which the first has overwritten "
                "with the gradient. Call swiglu with overwrite=False to run backward twice"
            )
        (gate_up,) = ctx.saved_tensors
        ctx.overwritten, grad = True, gate_up.detach()
        with dispatch.use_backend(ctx.backend):
            swiglu_bwd_in_place.run(grad_y, grad)
        increment_version(gate_up)  # so that other operations that saved it raise, too
        return grad


def swiglu(gate_up: Tensor, overwrite: bool = False) -> Tensor:
    """silu(gate) * up, where silu(z) = z * sigmoid(z).

    gate_up (num_rows, 2 * intermediate_size), gate in the first half of the columns
    -> (num_rows, intermediate_size). overwrite: nothing reads gate_up after this call, so the
    backward pass may overwrite it with the gradient (if gate_up is contiguous, and not under
    torch.compile); a second backward pass then raises RuntimeError, as does the backward pass of
    another operation that saved gate_up. Raises ValueError for an odd number of columns, and for
    overwriting a leaf of the graph.
    """
    check_rank("swiglu", 2, gate_up=gate_up)
    check_floats("swiglu", gate_up=gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up {tuple(gate_up.shape)} has an odd number of columns")
    needs_gradient = torch.is_grad_enabled() and gate_up.requires_grad
    if not (overwrite and needs_gradient) or is_traced(gate_up) or not gate_up.is_contiguous():
        return _swiglu(gate_up)
    if (gate_up if gate_up._base is None else gate_up._base).is_leaf:
        raise ValueError(
            f"swiglu: gate_up {tuple(gate_up.shape)} is a leaf that requires a gradient, or a view "
            "of one, and must not be overwritten. Call swiglu with overwrite=False"
        )
    return _Overwriting.apply(gate_up)
