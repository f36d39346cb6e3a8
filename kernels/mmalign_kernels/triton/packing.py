"""Packing and unpacking of rows in Triton: every row of the result is written once, zeros too.

    gather:  out[i] = source[index[i]], or zeros where index[i] < 0
    sum:     out[r] = sum of grad[order[j]] for begins[r] <= j < begins[r + 1]

A program owns a few rows of the result by a part of their columns. unpack_rows gathers through the
inverse of its positions, so no pass writes zeros that another overwrites. The gradient of pack_rows
sums a row's copies in order (a stable sort of the positions on the device), without atomics or
synchronisation.

Bytes per row of b bytes: 2b; per row of zeros b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import part_of_rows, upcast


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows_kernel(
    source_ptr,  # (any, COLUMNS)
    index_ptr,  # (num_rows,)
    out_ptr,  # (num_rows, COLUMNS)
    num_rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns = part_of_rows(ROWS, BLOCK, COLUMNS)
    index = tl.load(index_ptr + rows, rows < num_rows, other=-1).to(tl.int64)[:, None]
    inside = columns < COLUMNS
    x = tl.load(source_ptr + index * COLUMNS + columns, (index >= 0) & inside, other=0)
    at = rows.to(tl.int64)[:, None] * COLUMNS + columns
    tl.store(out_ptr + at, x, (rows < num_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["num_positions"])
def _invert_kernel(
    positions_ptr,  # (num_positions,)
    inverse_ptr,  # (num_rows,) int32, filled with -1
    num_positions,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_positions
    tl.store(inverse_ptr + tl.load(positions_ptr + i, inside, other=0).to(tl.int64), i, inside)


@triton.jit
def _sum_rows_kernel(
    grad_ptr,  # (num_positions, COLUMNS)
    order_ptr,  # (num_positions,)
    begins_ptr,  # (num_rows + 1,)
    out_ptr,  # (num_rows, COLUMNS)
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    total = upcast(tl.zeros((BLOCK,), out_ptr.dtype.element_ty))
    for j in range(tl.load(begins_ptr + row), tl.load(begins_ptr + row + 1)):
        at = tl.load(order_ptr + j).to(tl.int64) * COLUMNS + columns
        total += upcast(tl.load(grad_ptr + at, inside, other=0))
    tl.store(out_ptr + row * COLUMNS + columns, total.to(out_ptr.dtype.element_ty), inside)


def _gather(source: Tensor, index: Tensor) -> Tensor:
    source, num_rows = source.contiguous(), index.shape[0]
    out = source.new_empty((num_rows, *source.shape[1:]))
    if out.numel():
        columns = out.numel() // num_rows
        rows, block, num_warps = launch.part_tile(columns, out)
        _gather_rows_kernel[(launch.ceil_div(num_rows, rows) * launch.ceil_div(columns, block),)](
            source, index.contiguous(), out, num_rows, COLUMNS=columns, ROWS=rows, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
    return out


def pack_rows_fwd(x: Tensor, positions: Tensor) -> Tensor:
    return _gather(x, positions)


def pack_rows_bwd(grad: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    grad = grad.contiguous()
    out = grad.new_empty((num_rows, *grad.shape[1:]))
    if out.numel():
        columns = out.numel() // num_rows
        ordered, order = torch.sort(positions, stable=True)
        rows = torch.arange(num_rows + 1, device=positions.device, dtype=positions.dtype)
        block, num_warps = launch.flat_tile(out)
        block = min(block, launch.next_power_of_2(columns))
        _sum_rows_kernel[(num_rows, launch.ceil_div(columns, block))](
            grad, order, torch.searchsorted(ordered, rows), out,
            COLUMNS=columns, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return out


def unpack_rows_fwd(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    inverse = positions.new_full((num_rows,), -1, dtype=torch.int32)
    block, num_positions = 1024, positions.shape[0]
    if num_positions:
        _invert_kernel[(launch.ceil_div(num_positions, block),)](
            positions.contiguous(), inverse, num_positions, BLOCK=block
        )
    return _gather(packed, inverse)


def unpack_rows_bwd(grad: Tensor, positions: Tensor) -> Tensor:
    return _gather(grad, positions)
