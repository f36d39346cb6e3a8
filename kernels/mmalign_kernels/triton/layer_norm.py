"""LayerNorm with bias in Triton.

    xhat = (x - mean) * rstd;  y = xhat * weight + bias
    dx = rstd * (w*dy - mean(w*dy) - xhat * mean(w*dy*xhat))

Programs own rows as in rms_norm.py. Mean and variance come from the row in registers (two sums, no
cancellation), and the backward pass recomputes them: the tower is frozen, so nothing is saved.
dweight and dbias share one partial row per program.

Bytes of a row of H columns of b bytes: forward 2bH, backward 3bH.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..operation import compute_dtype
from . import launch
from .common import column_sum, upcast


@triton.jit
def _normalize(x, inside, eps, COLUMNS: tl.constexpr):
    """xhat and rstd of rows x [ROWS, BLOCK]; zeros outside."""
    mean = tl.sum(x, 1)[:, None] / COLUMNS
    centred = tl.where(inside, x - mean, 0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / COLUMNS + eps)
    return centred * rstd, rstd


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (num_rows, COLUMNS)
    weight_ptr,  # (COLUMNS,)
    bias_ptr,  # (COLUMNS,)
    y_ptr,
    num_rows,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None]
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    at = rows.to(tl.int64)[:, None] * COLUMNS + columns
    x = upcast(tl.load(x_ptr + at, inside, other=0, eviction_policy="evict_first"))
    weight = upcast(tl.load(weight_ptr + columns, columns < COLUMNS, other=0))
    bias = upcast(tl.load(bias_ptr + columns, columns < COLUMNS, other=0))
    normed, _ = _normalize(x, inside, eps, COLUMNS)
    tl.store(y_ptr + at, (normed * weight + bias).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_bwd_kernel(
    grad_y_ptr,  # (num_rows, COLUMNS)
    x_ptr,
    weight_ptr,  # (COLUMNS,)
    grad_x_ptr,
    partial_ptr,  # (num_programs, 2, COLUMNS): of dweight and of dbias
    num_rows,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None]
    weight = upcast(tl.load(weight_ptr + columns, columns < COLUMNS, other=0))
    grad_weight = tl.zeros((ROWS, BLOCK), weight.dtype)
    grad_bias = tl.zeros((ROWS, BLOCK), weight.dtype)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
        at = rows.to(tl.int64)[:, None] * COLUMNS + columns
        grad = upcast(tl.load(grad_y_ptr + at, inside, other=0))
        x = upcast(tl.load(x_ptr + at, inside, other=0))
        normed, rstd = _normalize(x, inside, eps, COLUMNS)
        grad_weight += grad * normed
        grad_bias += grad
        grad *= weight
        along = tl.sum(grad * normed, 1)[:, None] / COLUMNS
        grad_x = (grad - tl.sum(grad, 1)[:, None] / COLUMNS - normed * along) * rstd
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
    partial = partial_ptr + tl.program_id(0) * 2 * COLUMNS + columns
    tl.store(partial, tl.sum(grad_weight, 0)[None], columns < COLUMNS)
    tl.store(partial + COLUMNS, tl.sum(grad_bias, 0)[None], columns < COLUMNS)


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x, y = x.contiguous(), x.new_empty(x.shape)
    num_rows, columns = x.shape
    rows, block, num_warps = launch.row_tile(x)
    if num_rows:
        _layer_norm_fwd_kernel[(launch.ceil_div(num_rows, rows),)](
            x, weight.contiguous(), bias.contiguous(), y, num_rows, eps,
            COLUMNS=columns, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return y


def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    num_rows, columns = x.shape
    grad_x = x.new_empty(x.shape)
    rows, block, num_warps = launch.row_tile(x)
    tiles = launch.ceil_div(num_rows, rows)
    programs = launch.persistent(x, tiles, num_warps)
    partial = x.new_empty((programs, 2 * columns), dtype=compute_dtype(x))
    if num_rows:
        _layer_norm_bwd_kernel[(programs,)](
            grad_y, x, weight, grad_x, partial, num_rows, eps, COLUMNS=columns,
            ROWS=rows, BLOCK=block, STAGES=launch.stages(x, 2), num_warps=num_warps,
        )  # fmt: skip
    sums = (column_sum(part, weight.dtype) for part in partial.chunk(2, 1))
    return grad_x, *sums
