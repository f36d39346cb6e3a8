"""SwiGLU in Triton: y = silu(gate) * up, silu(z) = z * s, s = sigmoid(z).

    dgate = dy * up * s * (1 + gate * (1 - s));  dup = dy * silu(gate)

A program owns a tile of the result, a few rows by a part of their columns, and reads both halves of
the input there. Saved for the backward pass: the input, whose sigmoid is recomputed. A program
reads all its inputs before it writes, so the gradient may overwrite the input: swiglu_bwd keeps
gate_up, swiglu_bwd_in_place overwrites it and allocates nothing.

Bytes per row of I columns of b bytes: forward 3bI, backward 5bI.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import part_of_rows, upcast


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_fwd_kernel(
    gate_up_ptr,  # (num_rows, 2 * COLUMNS)
    y_ptr,  # (num_rows, COLUMNS)
    num_rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns = part_of_rows(ROWS, BLOCK, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    at = rows.to(tl.int64)[:, None] * COLUMNS  # [ROWS, 1]
    gate = upcast(tl.load(gate_up_ptr + 2 * at + columns, inside, other=0))
    up = upcast(tl.load(gate_up_ptr + 2 * at + COLUMNS + columns, inside, other=0))
    y = gate * _sigmoid(gate) * up
    tl.store(y_ptr + at + columns, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_bwd_kernel(
    grad_y_ptr,  # (num_rows, COLUMNS)
    gate_up_ptr,  # (num_rows, 2 * COLUMNS)
    grad_ptr,  # like gate_up, or gate_up itself
    num_rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns = part_of_rows(ROWS, BLOCK, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    at = rows.to(tl.int64)[:, None] * COLUMNS
    grad_y = upcast(tl.load(grad_y_ptr + at + columns, inside, other=0))
    gate = upcast(tl.load(gate_up_ptr + 2 * at + columns, inside, other=0))
    up = upcast(tl.load(gate_up_ptr + 2 * at + COLUMNS + columns, inside, other=0))
    sigmoid = _sigmoid(gate)
    grad_up = grad_y * gate * sigmoid
    grad_gate = grad_y * up * sigmoid * (1 + gate * (1 - sigmoid))
    dtype = grad_ptr.dtype.element_ty
    tl.store(grad_ptr + 2 * at + columns, grad_gate.to(dtype), inside)
    tl.store(grad_ptr + 2 * at + COLUMNS + columns, grad_up.to(dtype), inside)


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    num_rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty((num_rows, columns))
    rows, block, num_warps = launch.part_tile(columns, gate_up)
    if y.numel():
        _swiglu_fwd_kernel[(launch.ceil_div(num_rows, rows) * launch.ceil_div(columns, block),)](
            gate_up, y, num_rows, COLUMNS=columns, ROWS=rows, BLOCK=block, num_warps=num_warps
        )
    return y


def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    grad = gate_up.new_empty(gate_up.shape)
    _write_gradient(grad_y.contiguous(), gate_up.contiguous(), grad)
    return grad


def swiglu_bwd_in_place(grad_y: Tensor, gate_up: Tensor) -> None:
    _write_gradient(grad_y.contiguous(), gate_up, gate_up)


def _write_gradient(grad_y: Tensor, gate_up: Tensor, grad: Tensor) -> None:
    num_rows, columns = grad_y.shape
    rows, block, num_warps = launch.part_tile(columns, gate_up)
    if grad.numel():
        _swiglu_bwd_kernel[(launch.ceil_div(num_rows, rows) * launch.ceil_div(columns, block),)](
            grad_y, gate_up, grad, num_rows, COLUMNS=columns, ROWS=rows, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
