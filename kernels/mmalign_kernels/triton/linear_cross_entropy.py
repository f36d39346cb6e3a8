"""Language-model head and cross entropy of the supervised rows with gradients, in three products.

loss = sum over supervised rows of lse - logit[target], lse = log sum exp (h W^T)
dlogits = softmax(logits) - onehot(target), dhidden = dlogits W, dweight = dlogits^T h

First choose_rows and gather_rows (logits.py), then per chunk of about 4,000 rows

1. row_statistics    exps = exp(logits - largest of the row's tile) in the input's dtype, and the
                     statistics of every tile, from fp32 logits in registers
2. softmax_gradient  a program owns a row: over its tiles, top = max(largest) and
                     total = sum(sums * exp(largest - top)); then one read and one write in place,
                     exps -> dlogits = exps * exp(largest - top) / total - onehot
3. hidden_gradient   dlogits W, scattered to the original rows (lm_head_gradients.py)
4. weight_gradient   dlogits^T h, in fp32; chunks after the first accumulate

and once for all chunks loss = sum of log(total) + top - logit[target]; gather_rows computes the
logit of the target as a dot product with the row that it holds.

Why not cuBLAS: the number of supervised rows N is on the device, and cuBLAS takes its sizes from
the host. It would multiply all rows, 2.3 times (fine-tuning, 44% supervised) to 14 times
(pretraining, 7%) the work of these kernels, which stop at `count`. Kernels that write no logits
would need a fourth product in the backward pass (+33%) to save two passes over them.

H = 4096, V = 32,000, bf16, N = 3,600 rows of 8,192: three products of 2 N H V = 0.94 TFLOP. And:
step 2 reads and writes 230 MB of logits each; gathering and zeroing rows moves 130 MB; step 4
writes 524 MB of dweight. The backward pass scales: reads 524 MB and writes 262 MB of dweight, 134
MB of dhidden. The buffer of logits holds 4,096 x 32,000, 262 MB.

Sums have a fixed order, so results are deterministic. Unsupervised rows are never read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import compute_dtype
from . import launch
from .common import upcast
from .lm_head_gradients import hidden_gradient, weight_gradient
from .logits import PAD, Chosen, choose_rows, gather_rows, padded, row_statistics, softmax_scale

# kernels


@triton.jit(do_not_specialize=["first_row"])
def _softmax_gradient_kernel(
    exps_ptr,  # (chunk_rows, NUM_TILES * TILE); dlogits when done
    maxima_ptr,  # (total_rows, NUM_TILES)
    sums_ptr,  # (total_rows, NUM_TILES)
    target_logits_ptr,  # (total_rows,)
    chosen_ids_ptr,  # (total_rows,)
    count_ptr,  # (1,)
    first_row,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PAD: tl.constexpr,
    TILES_POWER_OF_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr) - first_row
    exps_ptr += row * NUM_TILES * TILE
    tiles = tl.arange(0, BLOCK)
    within = tl.arange(0, TILE)
    if row < count:
        row += first_row
        top, total = softmax_scale(maxima_ptr, sums_ptr, row, NUM_TILES, TILES_POWER_OF_2)
        target = tl.load(chosen_ids_ptr + row)
        at_target = tl.exp(tl.load(target_logits_ptr + row) - top) / total - 1  # exps is rounded
        for begin in range(0, NUM_TILES, BLOCK):
            inside = begin + tiles < NUM_TILES
            column = (begin + tiles)[:, None] * TILE + within[None, :]
            largest = tl.load(maxima_ptr + row * NUM_TILES + begin + tiles, inside, other=0.0)
            exps = upcast(tl.load(exps_ptr + column, inside[:, None], other=0.0))
            grad = exps * (tl.exp(largest - top) / total)[:, None]
            grad = tl.where(column == target, at_target, grad)
            tl.store(exps_ptr + column, grad.to(exps_ptr.dtype.element_ty), inside[:, None])
    elif row < tl.cdiv(tl.maximum(count, 1), PAD) * PAD:  # rows that dweight's last step reads
        zero = tl.zeros((BLOCK, TILE), exps_ptr.dtype.element_ty)
        for begin in range(0, NUM_TILES, BLOCK):
            inside = begin + tiles < NUM_TILES
            column = (begin + tiles)[:, None] * TILE + within[None, :]
            tl.store(exps_ptr + column, zero, inside[:, None])


@triton.jit
def _losses_kernel(
    maxima_ptr,  # (total_rows, NUM_TILES)
    sums_ptr,  # (total_rows, NUM_TILES)
    target_logits_ptr,  # (total_rows,); losses when done
    count_ptr,  # (1,)
    NUM_TILES: tl.constexpr,
    TILES_POWER_OF_2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count_ptr):
        top, total = softmax_scale(maxima_ptr, sums_ptr, row, NUM_TILES, TILES_POWER_OF_2)
        loss = tl.log(total) + (top - tl.load(target_logits_ptr + row))
        tl.store(target_logits_ptr + row, loss)


@triton.jit
def _sum_losses_kernel(losses_ptr, count_ptr, loss_ptr, BLOCK: tl.constexpr):
    """One program: 16,384 losses are 64 KB."""
    count = tl.load(count_ptr)
    total = tl.zeros((BLOCK,), loss_ptr.dtype.element_ty)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + i, mask=i < count, other=0.0)
    tl.store(loss_ptr, tl.sum(total))


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    y = upcast(x) * tl.load(scale_ptr)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < size)


# launchers


def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, target_ids = lm_head_weight.contiguous(), target_ids.contiguous()
    hidden_states = hidden_states if hidden_states.stride(1) == 1 else hidden_states.contiguous()
    loss = weight.new_empty((), dtype=compute_dtype(weight))
    grad_hidden = weight.new_empty(hidden_states.shape if needs_hidden else 0)
    grad_weight = loss.new_empty(weight.shape if needs_weight else 0)
    if hidden_states.numel() == 0:
        return loss.zero_(), grad_hidden, grad_weight.zero_()
    rows, count = choose_rows(target_ids)
    target_logits = loss.new_empty(len(target_ids))
    chosen_ids = torch.empty_like(rows)
    grad_rows = grad_hidden if needs_hidden else None
    gathered = gather_rows(
        hidden_states, target_ids, rows, count, weight, target_logits, chosen_ids, grad_rows
    )
    chosen = Chosen(gathered, rows, count, chosen_ids, target_logits)
    statistics = _in_chunks(chosen, weight, grad_rows, grad_weight if needs_weight else None)
    _sum_losses(statistics, chosen, loss)
    return loss, grad_hidden, grad_weight


def _in_chunks(
    chosen: Chosen, weight: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> Tensor:
    """Writes the gradients that are not None; returns maxima and sums of all rows' tiles."""
    tile, total_rows = launch.tile_settings(weight), len(chosen.hidden_states)
    num_tiles, unit = launch.ceil_div(len(weight), tile.n), padded(1, tile)
    chunk_rows = min(max(launch.LOGITS_PER_CHUNK // len(weight) // unit, 1) * unit, total_rows)
    statistics = chosen.target_logits.new_empty(2, total_rows, num_tiles)
    wanted = grad_hidden is not None or grad_weight is not None
    logits = weight.new_empty(chunk_rows, num_tiles * tile.n) if wanted else None
    for first_row in range(0, total_rows, chunk_rows):
        num_rows = min(chunk_rows, total_rows - first_row)
        row_statistics(
            chosen.hidden_states, weight, chosen.count, logits, *statistics, first_row, num_rows
        )
        if wanted:
            _softmax_gradient(logits, statistics, chosen, first_row, num_rows)
        if grad_hidden is not None:
            hidden_gradient(logits, weight, chosen, grad_hidden, first_row, num_rows)
        if grad_weight is not None:
            weight_gradient(logits, chosen, grad_weight, first_row, num_rows)
    return statistics


def _sum_losses(statistics: Tensor, chosen: Chosen, loss: Tensor) -> None:
    num_tiles = statistics.shape[2]
    _losses_kernel[(len(chosen.rows),)](
        *statistics, chosen.target_logits, chosen.count, num_tiles,
        launch.next_power_of_2(num_tiles), num_warps=1,
    )  # fmt: skip
    _sum_losses_kernel[(1,)](chosen.target_logits, chosen.count, loss, 4096, num_warps=8)


def _softmax_gradient(
    logits: Tensor, statistics: Tensor, chosen: Chosen, first_row: int, num_rows: int
) -> None:
    num_tiles = statistics.shape[2]
    tile, tiles_power_of_2 = logits.shape[1] // num_tiles, launch.next_power_of_2(num_tiles)
    _softmax_gradient_kernel[(num_rows,)](
        logits, *statistics, chosen.target_logits, chosen.ids, chosen.count, first_row,
        TILE=tile, NUM_TILES=num_tiles, PAD=PAD, TILES_POWER_OF_2=tiles_power_of_2,
        BLOCK=min(8192 // tile, tiles_power_of_2), num_warps=8,
    )  # fmt: skip


def linear_cross_entropy_bwd(
    grad_hidden: Tensor, grad_weight: Tensor, grad_loss: Tensor
) -> tuple[Tensor, Tensor]:
    return tuple(_scaled(x, grad_loss, grad_hidden.dtype) for x in (grad_hidden, grad_weight))


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        block = 2048
        grid = (launch.ceil_div(x.numel(), block),)
        _scale_kernel[grid](x, scale, y, x.numel(), block, num_warps=8)
    return y
