"""The language-model head: gathers rows, and computes softmax statistics without writing logits.

The number of chosen rows stays on the device (`count`): the host launches for all rows, persistent
kernels loop over the first `count`, and nothing synchronises.

choose_rows    marks (num_rows,) -> indices of the chosen rows in order, count
gather_rows    the chosen rows, contiguous: each read and written once, 1% of the products' time.
               Every product then reads plain tiles; TMA cannot gather on sm_90.
row_statistics one product, hidden W^T. A program owns a tile of logits in registers and writes, per
               row and tile, the largest logit and the sum of exp(logit - largest): 8 bytes per 256
               columns. On request it also writes exp(logit - largest), in (0, 1], which has a
               smaller error in bf16 than a logit of 10 to 20.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import upcast
from .matmul import (
    load_tile,
    operand,
    place_of_tile,
    takes_descriptors,
)

IGNORE_INDEX = -100
PAD = 64  # rows after the last chosen one are zero up to a multiple of the longest k step
_SCAN_BLOCK = 2048

# kernels


@triton.jit(do_not_specialize=["num_rows"])
def _choose_rows_kernel(
    marks_ptr,  # (num_rows,) integers
    rows_ptr,  # (num_rows,) int32
    slots_ptr,  # (num_rows,) int32 or None: where a chosen row went
    count_ptr,  # (1,) int32
    num_rows,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program recounts the marks before its block (from L2) instead of waiting for others."""
    begin = tl.program_id(0) * BLOCK
    earlier = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, begin, BLOCK):
        earlier += (tl.load(marks_ptr + start + tl.arange(0, BLOCK)) != IGNORED).to(tl.int32)
    row = begin + tl.arange(0, BLOCK)
    inside = row < num_rows
    chosen = (tl.load(marks_ptr + row, mask=inside, other=IGNORED) != IGNORED).to(tl.int32)
    slot = tl.sum(earlier) + tl.cumsum(chosen) - chosen
    tl.store(rows_ptr + slot, row, mask=chosen != 0)
    if slots_ptr is not None:
        tl.store(slots_ptr + row, slot, mask=chosen != 0)
    if begin + BLOCK >= num_rows:
        tl.store(count_ptr, tl.sum(earlier) + tl.sum(chosen))


@triton.jit(do_not_specialize=["num_rows"])
def _gather_rows_kernel(
    x_ptr,  # (num_rows, COLUMNS), rows row_stride apart
    marks_ptr,  # (num_rows,): target ids where there are target_logits
    rows_ptr,  # (num_rows,)
    count_ptr,  # (1,)
    weight_ptr,  # (vocab_size, COLUMNS)
    gathered_ptr,  # (num_rows up to PAD, COLUMNS)
    target_logits_ptr,  # (num_rows,), in the compute dtype, or None
    chosen_ids_ptr,  # (num_rows,) int32 or None: target ids of the chosen rows
    unchosen_ptr,  # (num_rows, COLUMNS) or None: zeros are written to rows that are not chosen
    num_rows,
    row_stride,
    IGNORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    count = tl.load(count_ptr)
    columns = tl.arange(0, BLOCK)
    to = gathered_ptr + i.to(tl.int64) * COLUMNS
    zero = tl.zeros((BLOCK,), gathered_ptr.dtype.element_ty)
    if i < count:
        row = tl.load(rows_ptr + i).to(tl.int64)
        logit = upcast(zero)
        target = tl.load(marks_ptr + row).to(tl.int64)
        for begin in range(0, COLUMNS, BLOCK):
            inside = begin + columns < COLUMNS
            x = tl.load(x_ptr + row * row_stride + begin + columns, mask=inside, other=0.0)
            tl.store(to + begin + columns, x, mask=inside)
            if target_logits_ptr is not None:
                w = tl.load(weight_ptr + target * COLUMNS + begin + columns, mask=inside, other=0.0)
                logit += upcast(x) * upcast(w)
        if target_logits_ptr is not None:
            tl.store(target_logits_ptr + i, tl.sum(logit))
            tl.store(chosen_ids_ptr + i, target)
    elif i < tl.cdiv(tl.maximum(count, 1), PAD) * PAD:
        for begin in range(0, COLUMNS, BLOCK):
            tl.store(to + begin + columns, zero, mask=begin + columns < COLUMNS)
    if unchosen_ptr is not None:
        if i < num_rows:
            if tl.load(marks_ptr + i) == IGNORED:
                to = unchosen_ptr + i.to(tl.int64) * COLUMNS
                for begin in range(0, COLUMNS, BLOCK):
                    tl.store(to + begin + columns, zero, mask=begin + columns < COLUMNS)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _row_statistics_kernel(
    hidden,  # (total_rows, HIDDEN)
    weight,  # (VOCAB, HIDDEN)
    count_ptr,  # (1,)
    exps_ptr,  # (num_rows, EXPS_STRIDE) or None
    maxima_ptr,  # (total_rows, tiles of VOCAB)
    sums_ptr,  # (total_rows, tiles of VOCAB)
    first_row,
    num_rows,  # of this chunk, a multiple of BLOCK_M
    HIDDEN: tl.constexpr,
    VOCAB: tl.constexpr,
    EXPS_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    num_m = tl.cdiv(tl.minimum(tl.load(count_ptr) - first_row, num_rows), BLOCK_M)
    num_n: tl.constexpr = (VOCAB + BLOCK_N - 1) // BLOCK_N
    step = tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), num_m * num_n, step, flatten=True):
        m, n = place_of_tile(tile, num_m, num_n)
        row = first_row + m * BLOCK_M
        logits = tl.zeros((BLOCK_M, BLOCK_N), maxima_ptr.dtype.element_ty)
        for k in range(0, HIDDEN, BLOCK_K):
            x = load_tile(
                hidden, row, k, first_row + num_rows, HIDDEN, HIDDEN, BLOCK_M, BLOCK_K, DESCRIPTORS
            )
            w = load_tile(
                weight, n * BLOCK_N, k, VOCAB, HIDDEN, HIDDEN, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            logits = tl.dot(x, w.T, logits, input_precision="ieee", out_dtype=logits.dtype)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        if VOCAB % BLOCK_N != 0:
            logits = tl.where((column < VOCAB)[None, :], logits, float("-inf"))
        # rows beyond count hold anything, and may be written up to num_rows
        row = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        largest = tl.max(logits, 1)
        exps = tl.exp(logits - largest[:, None])
        if exps_ptr is not None:
            to = exps_ptr + row[:, None] * EXPS_STRIDE + column[None, :]
            tl.store(to, exps.to(exps_ptr.dtype.element_ty))
        row += first_row
        tl.store(maxima_ptr + row * num_n + n, largest)
        tl.store(sums_ptr + row * num_n + n, tl.sum(exps, 1))


@triton.jit
def softmax_scale(
    maxima_ptr,  # (num_rows, NUM_TILES)
    sums_ptr,  # (num_rows, NUM_TILES)
    row,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit of a row and the sum of exp(logit - largest), from those of its tiles."""
    tile = tl.arange(0, BLOCK)
    maxima = tl.load(maxima_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("-inf"))
    sums = tl.load(sums_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0.0)
    largest = tl.max(maxima)
    return largest, tl.sum(sums * tl.exp(maxima - largest))


# launchers


class Chosen(NamedTuple):
    """The supervised rows: the first `count` of every tensor; the others hold anything."""

    hidden_states: Tensor  # (total_rows, hidden_size)
    rows: Tensor  # (total_rows,) where they came from
    count: Tensor  # (1,)
    ids: Tensor  # (total_rows,)
    target_logits: Tensor  # (total_rows,)


def padded(num_rows: int, tile: launch.Tile) -> int:
    """Rows of a buffer of whole tiles and whole PADs."""
    unit = max(tile.m, PAD)
    return max(launch.ceil_div(num_rows, unit), 1) * unit


def column_block(num_columns: int) -> dict[str, int]:
    block = min(launch.next_power_of_2(num_columns), 4096)
    return {"BLOCK": block, "num_warps": 4}


def choose_rows(marks: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    num_rows = len(marks)
    rows, count = (marks.new_empty(size, dtype=torch.int32) for size in (num_rows, 1))
    grid = (launch.ceil_div(num_rows, _SCAN_BLOCK),)
    _choose_rows_kernel[grid](
        marks, rows, slots, count, num_rows, IGNORE_INDEX, _SCAN_BLOCK, num_warps=8
    )
    return rows, count


def gather_rows(
    x: Tensor,
    marks: Tensor,
    rows: Tensor,
    count: Tensor,
    weight: Tensor,
    target_logits: Tensor | None = None,
    chosen_ids: Tensor | None = None,
    unchosen: Tensor | None = None,
) -> Tensor:
    """x[rows[:count]], then zeros up to a multiple of PAD, then anything."""
    num_rows, num_columns = x.shape
    gathered = x.new_empty(padded(num_rows, launch.tile_settings(x)), num_columns)
    _gather_rows_kernel[(launch.ceil_div(num_rows, PAD) * PAD,)](
        x, marks, rows, count, weight, gathered, target_logits, chosen_ids, unchosen,
        num_rows, x.stride(0), IGNORE_INDEX, num_columns, PAD, **column_block(num_columns),
    )  # fmt: skip
    return gathered


def row_statistics(
    gathered: Tensor,
    weight: Tensor,
    count: Tensor,
    exps: Tensor | None,
    maxima: Tensor,
    sums: Tensor,
    first_row: int,
    num_rows: int,
) -> None:
    """Statistics of the chosen ones among rows first_row to first_row + num_rows of gathered."""
    tile, descriptors = launch.tile_settings(gathered), takes_descriptors(gathered, weight)
    vocab_size, hidden_size = weight.shape
    tiles = launch.ceil_div(num_rows, tile.m) * launch.ceil_div(vocab_size, tile.n)
    _row_statistics_kernel[(min(tiles, launch.gpu(weight).num_multiprocessors),)](
        operand(gathered, tile.m, tile.k, descriptors),
        operand(weight, tile.n, tile.k, descriptors),
        count, exps, maxima, sums, first_row, num_rows,
        hidden_size, vocab_size, None if exps is None else exps.stride(0),
        tile.m, tile.n, tile.k, descriptors, **tile.launch_options,
    )  # fmt: skip
