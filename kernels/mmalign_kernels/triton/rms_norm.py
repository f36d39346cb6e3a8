"""RMSNorm, alone or after the residual addition, in Triton.

    rstd = 1 / sqrt(mean(x^2) + eps);  y = x * rstd * weight
    dx = rstd * (w*dy - xhat * mean(w*dy*xhat)) + grad_residual,  xhat = x * rstd
    dweight = sum over rows of dy * xhat

Forward: a program owns a row (or several narrow ones) and holds it in registers, so a row is read
once and written once. Backward: two programs per multiprocessor own every num_programs-th row; the
next rows are copied to shared memory meanwhile. Each accumulates its dweight in registers and
writes one partial row; a second kernel sums the partial rows in a fixed order. With a frozen weight
none of that is compiled.

Bytes per row of H columns of b bytes: forward 2bH, with the addition 4bH, rstd 4; backward 3bH,
with a residual gradient 4bH. Partial rows: 4H bytes per program, written once and read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..operation import empty_statistics
from . import launch
from .common import column_sum, upcast


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,  # (num_rows, COLUMNS)
    residual_ptr,  # like x, or unused
    weight_ptr,  # (COLUMNS,)
    y_ptr,
    new_residual_ptr,
    rstd_ptr,  # (num_rows,)
    num_rows,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None]
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
    at = rows.to(tl.int64)[:, None] * COLUMNS + columns  # [ROWS, BLOCK]
    weight = tl.load(weight_ptr + columns, columns < COLUMNS, other=0, eviction_policy="evict_last")
    x = tl.load(x_ptr + at, inside, other=0, eviction_policy="evict_first")
    if ADDS:
        residual = tl.load(residual_ptr + at, inside, other=0, eviction_policy="evict_first")
        x = (upcast(x) + upcast(residual)).to(x.dtype)  # rounded before the norm reads it
        tl.store(new_residual_ptr + at, x, inside)
    x = upcast(x)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / COLUMNS + eps)
    tl.store(y_ptr + at, (x * rstd[:, None] * upcast(weight)).to(y_ptr.dtype.element_ty), inside)
    tl.store(rstd_ptr + rows, rstd, rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_bwd_kernel(
    grad_y_ptr,  # (num_rows, COLUMNS)
    grad_residual_ptr,  # like grad_y, or unused
    x_ptr,
    weight_ptr,  # (COLUMNS,)
    rstd_ptr,  # (num_rows,)
    grad_x_ptr,
    partial_ptr,  # (num_programs, COLUMNS), in the compute dtype
    num_rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None]
    weight = upcast(tl.load(weight_ptr + columns, columns < COLUMNS, other=0))
    grad_weight = tl.zeros((ROWS, BLOCK), weight.dtype)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < COLUMNS)
        at = rows.to(tl.int64)[:, None] * COLUMNS + columns
        grad = upcast(tl.load(grad_y_ptr + at, inside, other=0))
        x = upcast(tl.load(x_ptr + at, inside, other=0))
        rstd = tl.load(rstd_ptr + rows, rows < num_rows, other=0)[:, None]
        normed = x * rstd
        if NEEDS_WEIGHT:
            grad_weight += grad * normed
        grad *= weight
        along = tl.sum(grad * normed, 1)[:, None] / COLUMNS
        grad_x = (grad - normed * along) * rstd
        if ADDS:
            grad_x += upcast(tl.load(grad_residual_ptr + at, inside, other=0))
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
    if NEEDS_WEIGHT:
        partial = tl.sum(grad_weight, 0)[None]
        tl.store(partial_ptr + tl.program_id(0) * COLUMNS + columns, partial, columns < COLUMNS)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple:
    num_rows, columns = x.shape
    y, rstd = x.new_empty(x.shape), empty_statistics(x)
    new_residual = y if residual is None else x.new_empty(x.shape)
    rows, block, num_warps = launch.row_tile(x)
    if num_rows:
        _rms_norm_fwd_kernel[(launch.ceil_div(num_rows, rows),)](
            x, x if residual is None else residual, weight, y, new_residual, rstd, num_rows, eps,
            COLUMNS=columns, ROWS=rows, BLOCK=block, ADDS=residual is not None,
            num_warps=num_warps,
        )  # fmt: skip
    return y, new_residual, rstd


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x.contiguous(), None, weight.contiguous(), eps)
    return y, rstd


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x.contiguous(), residual.contiguous(), weight.contiguous(), eps)


def rms_norm_bwd(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    adds = grad_residual is not None
    grad_residual = grad_residual.contiguous() if adds else x
    num_rows, columns = x.shape
    grad_x = x.new_empty(x.shape)
    rows, block, num_warps = launch.row_tile(x)
    programs = launch.persistent(x, launch.ceil_div(num_rows, rows), num_warps)
    partial = rstd.new_empty((programs, columns) if needs_weight else 0)
    if num_rows:
        _rms_norm_bwd_kernel[(programs,)](
            grad_y, grad_residual, x, weight, rstd.contiguous(), grad_x, partial, num_rows,
            COLUMNS=columns, ROWS=rows, BLOCK=block, ADDS=adds, NEEDS_WEIGHT=needs_weight,
            STAGES=launch.stages(x, 3 if adds else 2), num_warps=num_warps,
        )  # fmt: skip
    return grad_x, column_sum(partial, weight.dtype) if needs_weight else weight.new_empty(0)
