"""SwiGLU: silu(gate) * up, Shazeer 2020 (arXiv 2002.05202).

Reads gate and up side by side in one row, as one matrix product writes them. Kept for the backward
pass: the input alone; its silu is computed again.
"""

from typing import Any

from torch import Tensor

from .checks import check_floats, check_rank
from .operation import differentiable, operation


@operation
def swiglu_fwd(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@operation
def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad_y: Tensor) -> Tensor:
    return swiglu_bwd(grad_y, ctx.saved_tensors[0])


_swiglu = differentiable(swiglu_fwd, _keep, _backward)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(z) = z * sigmoid(z).

    gate_up (num_rows, 2 * intermediate_size), gate in the first half of the columns
    -> (num_rows, intermediate_size). Raises ValueError for an odd number of columns.
    """
    check_rank("swiglu", 2, gate_up=gate_up)
    check_floats("swiglu", gate_up=gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up {tuple(gate_up.shape)} has an odd number of columns")
    return _swiglu(gate_up)
