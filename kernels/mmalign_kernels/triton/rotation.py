"""Rotary position embedding of separate heads in Triton, for the attention libraries.

Reads and writes each head once, in place if out is x; a program owns ROWS tokens and SHARE heads,
and loads the angles of its tokens once. Our own attention rotates queries on load
(rotary_attention.py).
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_attention
from .attention_parts import load_angles, load_tile, rotate, store_tile
from .common import upcast
from .launch import ceil_div


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_heads_kernel(
    out_ptr,  # (num_tokens, HEADS, 2 * HALF) with strides OUT_ROW, OUT_HEAD, 1
    x_ptr,  # the same with strides X_ROW, X_HEAD, 1
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    num_tokens,
    OUT_ROW: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    X_ROW: tl.constexpr,
    X_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, row, num_tokens, HALF, ROWS, BLOCK_HALF
    )
    if INVERSE:
        sin = -sin
    first_head = tl.program_id(1) * SHARE
    for head in range(first_head, tl.minimum(first_head + SHARE, HEADS)):
        ptr = x_ptr + head * X_HEAD
        first = load_tile(ptr, row, num_tokens, X_ROW, HALF, ROWS, BLOCK_HALF, True)
        second = load_tile(ptr + HALF, row, num_tokens, X_ROW, HALF, ROWS, BLOCK_HALF, True)
        first, second = rotate(upcast(first), upcast(second), cos, sin)
        ptr = out_ptr + head * OUT_HEAD
        store_tile(ptr, first, row, num_tokens, OUT_ROW, HALF, ROWS, BLOCK_HALF)
        store_tile(ptr + HALF, second, row, num_tokens, OUT_ROW, HALF, ROWS, BLOCK_HALF)


def rotate_heads(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, out: Tensor, inverse: bool
) -> None:
    num_tokens, heads, head_dim = x.shape
    if not num_tokens:
        return
    assert x.stride(2) == out.stride(2) == 1
    rows, share = launch_attention.rotate_keys(x, head_dim)
    _rotate_heads_kernel[(ceil_div(num_tokens, rows), ceil_div(heads, share))](
        out, x, cos.contiguous(), sin.contiguous(), position_ids.contiguous(), num_tokens,
        OUT_ROW=out.stride(0), OUT_HEAD=out.stride(1), X_ROW=x.stride(0), X_HEAD=x.stride(1),
        HEADS=heads, HALF=head_dim // 2, INVERSE=inverse, ROWS=rows, SHARE=share,
        BLOCK_HALF=launch_attention.block_columns(head_dim) // 2,
    )  # fmt: skip
