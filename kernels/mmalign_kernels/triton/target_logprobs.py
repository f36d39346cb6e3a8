"""log_softmax(h W^T)[target], several targets to a row, without logits in memory.

logprob[i] = h[row_i] . W[target_i] - lse[row_i], lse = log sum exp (h W^T)

choose_rows and gather_rows (logits.py) gather the distinct rows that have targets; row_statistics
multiplies each once and keeps 8 bytes per 256 logits; then a program owns a target: it combines the
statistics of its row and computes one dot product in fp32. A result does not depend on the order of
targets or on the other targets.

Bytes, H = 4096, V = 32,000, bf16: per row 16 KB gathered and 1 KB of statistics, W (262 MB) once
per 1,024 rows, per target 16 KB. FLOPs: 2 H V = 0.26 GFLOP per row.

Scoring needs no gradient; the backward pass is the reference's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operation import compute_dtype, empty_statistics
from ..reference.target_logprobs import target_logprobs_bwd
from . import launch
from .common import upcast
from .logits import (
    IGNORE_INDEX,
    choose_rows,
    column_block,
    gather_rows,
    row_statistics,
    softmax_scale,
)

__all__ = ["target_logprobs_bwd", "target_logprobs_fwd"]


@triton.jit
def _target_logprobs_kernel(
    gathered_ptr,  # (num_rows, COLUMNS)
    weight_ptr,  # (vocab_size, COLUMNS)
    target_ids_ptr,  # (num_targets,)
    target_rows_ptr,  # (num_targets,) or None: target i is read from row i
    slots_ptr,  # (num_rows,): place of a row among the gathered
    maxima_ptr,  # (num_rows, NUM_TILES)
    sums_ptr,  # (num_rows, NUM_TILES)
    logprobs_ptr,  # (num_targets,)
    COLUMNS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_POWER_OF_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = i
    if target_rows_ptr is not None:
        row = tl.load(target_rows_ptr + i)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    x_ptr = gathered_ptr + slot * COLUMNS
    w_ptr = weight_ptr + tl.load(target_ids_ptr + i).to(tl.int64) * COLUMNS
    products = tl.zeros((BLOCK,), logprobs_ptr.dtype.element_ty)
    for begin in range(0, COLUMNS, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        x = upcast(tl.load(x_ptr + column, mask=inside, other=0.0))
        products += x * upcast(tl.load(w_ptr + column, mask=inside, other=0.0))
    top, total = softmax_scale(maxima_ptr, sums_ptr, slot, NUM_TILES, TILES_POWER_OF_2)
    tl.store(logprobs_ptr + i, tl.sum(products) - top - tl.log(total))


def target_logprobs_fwd(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, target_rows: Tensor | None
) -> Tensor:
    weight, target_ids = lm_head_weight.contiguous(), target_ids.contiguous()
    hidden_states = hidden_states if hidden_states.stride(1) == 1 else hidden_states.contiguous()
    num_tiles = launch.ceil_div(len(weight), launch.tile_settings(weight).n)
    logprobs = weight.new_empty(len(target_ids), dtype=compute_dtype(weight))
    if len(target_ids) == 0:
        return logprobs
    marks = _marks(hidden_states, target_rows)
    slots = marks.new_empty(len(marks))
    rows, count = choose_rows(marks, slots)
    gathered = gather_rows(hidden_states, marks, rows, count, weight)
    maxima, sums = (empty_statistics(gathered, num_tiles) for _ in range(2))
    row_statistics(gathered, weight, count, None, maxima, sums, 0, len(gathered))
    hidden_size = weight.shape[1]
    _target_logprobs_kernel[(len(target_ids),)](
        gathered, weight, target_ids, target_rows, slots, maxima, sums, logprobs,
        hidden_size, num_tiles, launch.next_power_of_2(num_tiles), **column_block(hidden_size),
    )  # fmt: skip
    return logprobs


def _marks(hidden_states: Tensor, target_rows: Tensor | None) -> Tensor:
    """0 for rows with a target, IGNORE_INDEX for others."""
    num_rows = len(hidden_states)
    if target_rows is None:
        return hidden_states.new_zeros(num_rows, dtype=torch.int32)
    marks = target_rows.new_full((num_rows,), IGNORE_INDEX, dtype=torch.int32)
    return marks.index_fill_(0, target_rows.long(), 0)
