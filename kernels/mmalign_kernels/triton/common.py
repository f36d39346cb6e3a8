"""What the kernels share: the compute dtype, tiles of elementwise kernels, sums over rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def upcast(x):
    """x in the compute dtype: fp32, or fp64 for fp64. Applied right after every load."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def part_of_rows(ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS,) and columns (1, BLOCK) of this program; neighbours own the same rows."""
    parts: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    return rows, tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)[None]


@triton.jit(do_not_specialize=["num_rows"])
def _column_sum_kernel(
    partial_ptr,  # (num_rows, COLUMNS) of fp32 or fp64, rows ROW_STRIDE apart
    out_ptr,  # (COLUMNS,)
    num_rows,
    COLUMNS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
    total = tl.zeros((ROWS_BLOCK, COLUMNS_BLOCK), partial_ptr.dtype.element_ty)
    for first in range(0, num_rows, ROWS_BLOCK):
        rows = first + tl.arange(0, ROWS_BLOCK)
        inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None]
        total += tl.load(partial_ptr + rows[:, None] * ROW_STRIDE + columns[None], inside, other=0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), columns < COLUMNS)


def column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of partial rows, the second half of weight gradients: in a fixed order, without atomics.

    partial (num_rows, num_columns), fp32 or fp64, contiguous rows -> (num_columns,) of dtype. One
    program owns a strip of columns and loops over its rows. Reads 4 bytes per partial element,
    mostly from L2, where the first half has just written them.
    """
    num_rows, columns = partial.shape
    out = partial.new_empty(columns, dtype=dtype)
    rows_block, columns_block, num_warps = 128, 32, 8
    _column_sum_kernel[(launch.ceil_div(columns, columns_block),)](
        partial, out, num_rows, COLUMNS=columns, ROW_STRIDE=partial.stride(0),
        ROWS_BLOCK=rows_block, COLUMNS_BLOCK=columns_block, num_warps=num_warps,
    )  # fmt: skip
    return out
