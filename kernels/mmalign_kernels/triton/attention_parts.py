"""What the attention kernels share: loads and stores of a tile of one head, rotation.

A tile has BLOCK_D columns, the next power of two; a narrower head is padded with zeros. A rotated
tile has its second half at column BLOCK_D / 2, in registers and in the copy of rotated keys:
head_dim 100 is stored as 50 columns, 14 zeros, 50 columns, 14 zeros.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import upcast

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


class Rotation(NamedTuple):
    """The inputs of rotary attention besides the projection."""

    rotated_k: Tensor  # (total_tokens, key_value_heads, BLOCK_D)
    cos: Tensor  # (max_positions, head_dim / 2) fp32
    sin: Tensor
    position_ids: Tensor  # (total_tokens,)


@triton.jit
def load_tile(
    ptr,  # column 0 of the head in the sample's first row
    first_row,
    length,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """(ROWS, BLOCK_D) from first_row on; 0 past the sample's length and past COLUMNS."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + tl.cast(first_row, tl.int64) * STRIDE + row * STRIDE + column
    if CHECK_ROWS and COLUMNS < BLOCK_D:
        return tl.load(ptrs, mask=(first_row + row < length) & (column < COLUMNS), other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=(first_row + row < length) & (column >= 0), other=0.0)
    elif COLUMNS < BLOCK_D:
        return tl.load(ptrs, mask=(row >= 0) & (column < COLUMNS), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    ptr,
    tile,
    first_row,
    length,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + tl.cast(first_row, tl.int64) * STRIDE + row * STRIDE + column
    tl.store(
        ptrs,
        tile.to(ptr.dtype.element_ty),
        mask=(first_row + row < length) & (column < COLUMNS),
    )


@triton.jit
def load_angles(
    cos_ptr,
    sin_ptr,
    position_ids_ptr,  # at the sample's first row
    first_row,
    length,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """cos and sin (ROWS, BLOCK_HALF) of every row's position; 0 outside."""
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    position = tl.load(position_ids_ptr + row, mask=row < length, other=0).to(tl.int64)
    offset = position[:, None] * HALF + column
    mask = (row < length)[:, None] & (column < HALF)
    return tl.load(cos_ptr + offset, mask=mask, other=0.0), tl.load(
        sin_ptr + offset, mask=mask, other=0.0
    )


@triton.jit
def rotate(first, second, cos, sin):
    """Rotation of the two halves of a head."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotate_inverse(first, second, cos, sin):
    """The inverse rotation."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def split_halves(tile, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, BLOCK_D // 2)), (0, 2, 1)))


@triton.jit
def load_query(
    q_ptr,
    rotated_ptr,  # memory of the program's own rows and head, written; unused without ROTARY
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    first_row,
    length,
    STRIDE: tl.constexpr,
    ROTATED_STRIDE: tl.constexpr,
    ROTATED_HALF: tl.constexpr,  # columns of a half in rotated_ptr
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Queries for the products, rotated if ROTARY.

    They are rotated in halves and loaded whole, by way of memory. Joined in registers they would be
    an operand that every step over the keys loads from shared memory again, and that fp64 products
    do not compile with.
    """
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        BLOCK_HALF: tl.constexpr = BLOCK_D // 2
        cos, sin = load_angles(
            cos_ptr, sin_ptr, position_ids_ptr, first_row, length, HALF, ROWS, BLOCK_HALF
        )
        first = load_tile(q_ptr, first_row, length, STRIDE, HALF, ROWS, BLOCK_HALF, True)
        second = load_tile(q_ptr + HALF, first_row, length, STRIDE, HALF, ROWS, BLOCK_HALF, True)
        first, second = rotate(upcast(first), upcast(second), cos, sin)
        ptr = rotated_ptr
        store_tile(ptr, first, first_row, length, ROTATED_STRIDE, ROTATED_HALF, ROWS, BLOCK_HALF)
        ptr += ROTATED_HALF
        store_tile(ptr, second, first_row, length, ROTATED_STRIDE, ROTATED_HALF, ROWS, BLOCK_HALF)
        tl.debug_barrier()  # what the program's other threads wrote is there
        row = first_row + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, BLOCK_D)[None, :]
        known = (row < length) & (column % BLOCK_HALF < ROTATED_HALF)
        if ROTATED_HALF < BLOCK_HALF:
            column = column // BLOCK_HALF * ROTATED_HALF + column % BLOCK_HALF
        return tl.load(rotated_ptr + row.to(tl.int64) * ROTATED_STRIDE + column, known, 0.0)
    else:
        return load_tile(q_ptr, first_row, length, STRIDE, HEAD_DIM, ROWS, BLOCK_D, True)


@triton.jit
def store_gradient(
    ptr,
    grad,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    first_row,
    length,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Gradient of queries or keys, by the inverse rotation if ROTARY."""
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        BLOCK_HALF: tl.constexpr = BLOCK_D // 2
        cos, sin = load_angles(
            cos_ptr, sin_ptr, position_ids_ptr, first_row, length, HALF, ROWS, BLOCK_HALF
        )
        first, second = split_halves(grad, ROWS, BLOCK_D)
        first, second = rotate_inverse(first, second, cos, sin)
        store_tile(ptr, first, first_row, length, STRIDE, HALF, ROWS, BLOCK_HALF)
        store_tile(ptr + HALF, second, first_row, length, STRIDE, HALF, ROWS, BLOCK_HALF)
    else:
        store_tile(ptr, grad, first_row, length, STRIDE, HEAD_DIM, ROWS, BLOCK_D)
