"""The two products of linear_cross_entropy that take the gradient of a chunk's logits.

hidden_gradient   dhidden = dlogits W, scattered to the original rows
weight_gradient   dweight = dlogits^T h, in fp32; chunks after the first accumulate

The number of supervised rows is on the device: programs own tiles in turn, and stop at `count`.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import upcast
from .logits import Chosen
from .matmul import halves, load_tile, operand, place_of_tile, takes_descriptors


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _hidden_gradient_kernel(
    grads,  # (num_rows, STRIDE): dlogits
    weight,  # (VOCAB, HIDDEN)
    rows_ptr,  # (total_rows,)
    count_ptr,  # (1,)
    grad_hidden_ptr,  # (total_rows, HIDDEN)
    first_row,
    num_rows,
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    count = tl.minimum(tl.load(count_ptr) - first_row, num_rows)
    num_m = tl.cdiv(count, BLOCK_M)
    num_n: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), num_m * num_n, step, flatten=True):
        m, n = place_of_tile(tile, num_m, num_n)
        total = upcast(tl.zeros((BLOCK_M, BLOCK_N), grad_hidden_ptr.dtype.element_ty))
        for k in range(0, VOCAB, BLOCK_K):  # dlogits beyond VOCAB are zero
            g = load_tile(
                grads, m * BLOCK_M, k, num_rows, STRIDE, STRIDE, BLOCK_M, BLOCK_K, DESCRIPTORS
            )
            w = load_tile(
                weight, k, n * BLOCK_N, VOCAB, HIDDEN, HIDDEN, BLOCK_K, BLOCK_N, DESCRIPTORS
            )
            total = tl.dot(g, w, total, input_precision="ieee", out_dtype=total.dtype)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < count
        to = tl.load(rows_ptr + first_row + row, mask=inside, other=0).to(tl.int64)
        inside = inside[:, None] & (column < HIDDEN)[None, :]
        place = grad_hidden_ptr + to[:, None] * HIDDEN + column[None, :]
        tl.store(place, total.to(grad_hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _weight_gradient_kernel(
    grads,  # (num_rows, STRIDE): dlogits
    gathered,  # (total_rows, HIDDEN)
    count_ptr,  # (1,)
    grad_weight_ptr,  # (VOCAB, HIDDEN), in the compute dtype
    first_row,
    num_rows,
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,  # writes, zeros too; later chunks accumulate, unless empty
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    count = tl.minimum(tl.load(count_ptr) - first_row, num_rows)
    num_m: tl.constexpr = (VOCAB + BLOCK_M - 1) // BLOCK_M
    num_n: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    num_tiles = num_m * num_n
    if not FIRST:
        num_tiles = tl.where(count > 0, num_tiles, 0)
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), num_tiles, step, flatten=True):
        m, n = place_of_tile(tile, num_m, num_n)
        total = tl.zeros((BLOCK_M, BLOCK_N), grad_weight_ptr.dtype.element_ty)
        for k in range(0, tl.maximum(count, 1), BLOCK_K):  # at least one step, over zeros
            g = load_tile(
                grads, k, m * BLOCK_M, num_rows, STRIDE, STRIDE, BLOCK_K, BLOCK_M, DESCRIPTORS
            )
            x = load_tile(
                gathered, first_row + k, n * BLOCK_N, first_row + num_rows, HIDDEN, HIDDEN,
                BLOCK_K, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
            total = tl.dot(g.T, x, total, input_precision="ieee", out_dtype=total.dtype)
        row, column = m * BLOCK_M, n * BLOCK_N
        left, right = halves(total)
        _add_halves(grad_weight_ptr, left, row, column, HIDDEN, VOCAB, FIRST)
        _add_halves(grad_weight_ptr, right, row, column + BLOCK_N // 2, HIDDEN, VOCAB, FIRST)


@triton.jit
def _add_halves(
    grad_weight_ptr,
    tile,
    row,
    column,
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    FIRST: tl.constexpr,
):
    left, right = halves(tile)
    _add_tile(grad_weight_ptr, left, row, column, HIDDEN, VOCAB, FIRST)
    _add_tile(grad_weight_ptr, right, row, column + left.shape[1], HIDDEN, VOCAB, FIRST)


@triton.jit
def _add_tile(
    grad_weight_ptr,
    tile,
    row,
    column,
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Write a tile of the weight's gradient at (row, column), or add to it."""
    rows = (row + tl.arange(0, tile.shape[0])).to(tl.int64)
    columns = column + tl.arange(0, tile.shape[1])
    inside = (rows < VOCAB)[:, None] & (columns < HIDDEN)[None, :]
    place = grad_weight_ptr + rows[:, None] * HIDDEN + columns[None, :]
    if not FIRST:
        tile += tl.load(place, mask=inside, other=0.0)
    tl.store(place, tile, mask=inside)


# launchers


def hidden_gradient(
    grads: Tensor,
    weight: Tensor,
    chosen: Chosen,
    grad_hidden: Tensor,
    first_row: int,
    num_rows: int,
) -> None:
    tile, descriptors = launch.tile_settings(weight), takes_descriptors(grads, weight)
    vocab_size, hidden_size = weight.shape
    tiles = launch.ceil_div(num_rows, tile.m) * launch.ceil_div(hidden_size, tile.n)
    _hidden_gradient_kernel[(min(tiles, launch.gpu(weight).num_multiprocessors),)](
        operand(grads, tile.m, tile.k, descriptors), operand(weight, tile.k, tile.n, descriptors),
        chosen.rows, chosen.count, grad_hidden, first_row, num_rows,
        HIDDEN=hidden_size, VOCAB=vocab_size, STRIDE=grads.stride(0), BLOCK_M=tile.m,
        BLOCK_N=tile.n, BLOCK_K=tile.k, DESCRIPTORS=descriptors, **tile.launch_options,
    )  # fmt: skip


def weight_gradient(
    grads: Tensor, chosen: Chosen, grad_weight: Tensor, first_row: int, num_rows: int
) -> None:
    hidden_states = chosen.hidden_states
    tile, descriptors = launch.tile_settings(grads), takes_descriptors(grads, hidden_states)
    vocab_size, hidden_size = grad_weight.shape
    tiles = launch.ceil_div(vocab_size, tile.m) * launch.ceil_div(hidden_size, tile.n)
    _weight_gradient_kernel[(min(tiles, launch.gpu(grads).num_multiprocessors),)](
        operand(grads, tile.k, tile.m, descriptors),
        operand(hidden_states, tile.k, tile.n, descriptors),
        chosen.count, grad_weight, first_row, num_rows, HIDDEN=hidden_size, VOCAB=vocab_size,
        STRIDE=grads.stride(0), FIRST=first_row == 0, BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_K=tile.k, DESCRIPTORS=descriptors, **tile.launch_options,
    )  # fmt: skip
