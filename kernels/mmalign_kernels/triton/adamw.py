"""AdamW in Triton: one pass over a parameter and its state, in place.

    p -= learning_rate * weight_decay * p
    m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p -= learning_rate / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

A bf16 weight is read and written as an integer: with its remainder it is the exact fp32 master;
alone it is the upper 16 bits after stochastic rounding. The random bits are Philox's, keyed by the
seed, with element, step and index in the list as counter: no state, the same on every rank. A
Philox call returns four numbers, so a program owns four consecutive blocks. A thread holds four
neighbours of a block: 128 bits of every fp32 tensor, 64 of every bf16 one. (With eight neighbours
Triton sends the moments through shared memory before it writes them.)

Moments in bf16 or in 8-bit codes (../adamw.py) have a kernel of their own, on rows of the 128
numbers that share a scale; a warp owns a row and finds its largest number by shuffles.

One launch for all tensors (tensor_table.py): one per tensor would cost the host 9 ms for the 448
adapter matrices of a 7B model at some 20 us per launch, several times the device's work. A program
finds its tensor by one load of all first tiles, 4 KiB in L2, before it moves 20 to 57 KB of weights
and state.

Bytes per element, gradient in the weight's dtype, fp32 moments: fp32 28, bf16 with split master 26,
bf16 with stochastic rounding 22; bf16 moments 8 less, codes 12 less (plus 0.13 for scales).
"""

import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32, uint8

from .. import adamw
from . import launch
from .tensor_table import address, find_tensor, tensor_tables

_MOMENTS = {float32: tl.float32, bfloat16: tl.int16, uint8: tl.uint8}  # bf16 as its bits
_DRAWS = tl.constexpr(4)  # numbers per Philox call
_ROW = tl.constexpr(adamw.BLOCK)
_DROPPED = tl.constexpr(adamw.DROPPED_BITS)
_PER_LARGEST = tl.constexpr(1 / adamw.LARGEST)
_SMALLEST_NORMAL = tl.constexpr(1 << 23)  # bits of adamw.SMALLEST_SCALE
_FIRST_SHIFT = tl.constexpr(2.0**adamw.FIRST.shift)
_SECOND_SHIFT = tl.constexpr(2.0**adamw.SECOND.shift)


@triton.jit
def _moved(p, g, m, v, decay, step_size, rest1, beta2, rest2, scale2, eps):
    """The new p, m, v of fp32 values; rest = 1 - beta, scale2 = 1 / sqrt(1 - beta2^step)."""
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p -= decay * p
    return p - step_size * m / (tl.sqrt(v) * scale2 + eps), m, v


@triton.jit
def _read_weight(param_ptr, remainder_ptr, at, inside, SPLIT: tl.constexpr, DRAWS: tl.constexpr):
    """The fp32 value of fp32, of bf16 bits, or of bits and remainder."""
    p = tl.load(param_ptr + at, inside, other=0)
    if SPLIT:
        low = tl.load(remainder_ptr + at, inside, other=0).to(tl.int32)
        p = ((p.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    elif DRAWS:
        p = (p.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return p


@triton.jit
def _write_weight(
    p, draw, param_ptr, remainder_ptr, at, inside, SPLIT: tl.constexpr, DRAWS: tl.constexpr
):
    if SPLIT:
        low = tl.where(p == p, p.to(tl.int32, bitcast=True), 0)
        tl.store(remainder_ptr + at, low.to(tl.int16), inside)
        tl.store(param_ptr + at, _upper_half(p, 0x8000), inside)
    elif DRAWS:
        tl.store(param_ptr + at, _upper_half(p, (draw & 0xFFFF).to(tl.int32)), inside)
    else:
        tl.store(param_ptr + at, p, inside)


@triton.jit
def _upper_half(x, carried):
    """fp32 -> bits of bf16. A NaN stays a NaN: a GPU's has all bits set, and would wrap."""
    bits = (x.to(tl.int32, bitcast=True) + carried) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.int16)


@triton.jit(do_not_specialize=["step", "seed"])
def _adamw_kernel(
    table_ptr,  # of params, remainders, grads and moments
    grad_scale_ptr,  # (), or unused
    decay,
    step_size,
    rest1,
    beta2,
    rest2,
    scale2,
    eps,
    step,
    seed,
    NUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,  # types of elements: fp32, or int16 for the bits of bf16
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    DRAWS: tl.constexpr,
):
    column, tile, numel, place = find_tensor(table_ptr, NUM, ALIGNED)
    param_ptr = address(table_ptr, column, NUM, ALIGNED, 0, WEIGHT)
    remainder_ptr = address(table_ptr, column, NUM, ALIGNED, 1, tl.int16)
    grad_ptr = address(table_ptr, column, NUM, ALIGNED, 2, GRAD)
    exp_avg_ptr = address(table_ptr, column, NUM, ALIGNED, 3, MOMENT)
    exp_avg_sq_ptr = address(table_ptr, column, NUM, ALIGNED, 4, MOMENT)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    first = tile.to(tl.int64) * BLOCK * _DRAWS + tl.arange(0, BLOCK)
    if SCALES:
        scale = tl.load(grad_scale_ptr)
        numel = tl.where(scale > 0, numel, 0)  # 0 or NaN: the step is skipped
    if DRAWS:
        draws = tl.philox(seed, lane, lane * 0 + step, lane * 0 + place, lane * 0)
    for i in tl.static_range(_DRAWS):
        at = first + i * BLOCK
        inside = at < numel
        p = _read_weight(param_ptr, remainder_ptr, at, inside, SPLIT, DRAWS)
        g = tl.load(grad_ptr + at, inside, other=0).to(tl.float32)
        if SCALES:
            g *= scale
        m = tl.load(exp_avg_ptr + at, inside, other=0)
        v = tl.load(exp_avg_sq_ptr + at, inside, other=0)
        p, m, v = _moved(p, g, m, v, decay, step_size, rest1, beta2, rest2, scale2, eps)
        tl.store(exp_avg_ptr + at, m, inside)
        tl.store(exp_avg_sq_ptr + at, v, inside)
        draw = draws[i] if DRAWS else 0
        _write_weight(p, draw, param_ptr, remainder_ptr, at, inside, SPLIT, DRAWS)


@triton.jit
def _read_moment(moment_ptr, scale, at, inside, CODES: tl.constexpr, SECOND: tl.constexpr):
    """The fp32 values of bf16 bits, or of codes and the scales of their rows."""
    stored = tl.load(moment_ptr + at, inside, other=0).to(tl.int32)
    if not CODES:
        return (stored << 16).to(tl.float32, bitcast=True)
    elif SECOND:
        return (stored << _DROPPED).to(tl.float32, bitcast=True) * _SECOND_SHIFT * scale
    else:
        size = ((stored & 0x7F) << _DROPPED).to(tl.float32, bitcast=True) * _FIRST_SHIFT * scale
        return tl.where(stored > 0x7F, -size, size)


@triton.jit
def _row_scale(x):
    """Maps a row's largest number to the largest code; as integers, NaN is above all numbers."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)
    scale = (largest.to(tl.float32, bitcast=True) * _PER_LARGEST).to(tl.int32, bitcast=True)
    return tl.maximum(scale, _SMALLEST_NORMAL).to(tl.float32, bitcast=True)


@triton.jit
def _write_moment(
    x, scale, draw, moment_ptr, at, inside, CODES: tl.constexpr, SECOND: tl.constexpr
):
    if CODES:
        bits = x.to(tl.int32, bitcast=True)
        size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        ratio = size * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        ratio *= 1 / _SECOND_SHIFT if SECOND else 1 / _FIRST_SHIFT
        carried = (draw & 0xFFFF).to(tl.int32) << (_DROPPED - 16)
        code = (ratio.to(tl.int32, bitcast=True) + carried) >> _DROPPED
        code = tl.minimum(code, 0xFF if SECOND else 0x7F)
        if SECOND:
            code = tl.where(size == 0, 0, tl.maximum(code, 1))
        else:
            code |= (bits >> 31) & 0x80
        tl.store(moment_ptr + at, code.to(tl.uint8), inside)
    else:
        tl.store(moment_ptr + at, _upper_half(x, (draw & 0xFFFF).to(tl.int32)), inside)


@triton.jit(do_not_specialize=["step", "seed"])
def _adamw_rounding_kernel(
    table_ptr,  # of params, remainders, grads, moments and, with codes, their scales
    grad_scale_ptr,  # (), or unused
    decay,
    step_size,
    rest1,
    beta2,
    rest2,
    scale2,
    eps,
    step,
    seed,
    NUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHT: tl.constexpr,  # types of elements: fp32, or int16 for the bits of bf16
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,  # int16 for the bits of bf16, or uint8 for codes
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    DRAWS: tl.constexpr,
):
    CODES: tl.constexpr = tl.uint8 == MOMENT
    column, tile, numel, place = find_tensor(table_ptr, NUM, ALIGNED)
    param_ptr = address(table_ptr, column, NUM, ALIGNED, 0, WEIGHT)
    remainder_ptr = address(table_ptr, column, NUM, ALIGNED, 1, tl.int16)
    grad_ptr = address(table_ptr, column, NUM, ALIGNED, 2, GRAD)
    exp_avg_ptr = address(table_ptr, column, NUM, ALIGNED, 3, MOMENT)
    exp_avg_sq_ptr = address(table_ptr, column, NUM, ALIGNED, 4, MOMENT)
    if CODES:
        exp_avg_scale_ptr = address(table_ptr, column, NUM, ALIGNED, 5, tl.float32)
        exp_avg_sq_scale_ptr = address(table_ptr, column, NUM, ALIGNED, 6, tl.float32)
    rows = tl.arange(0, BLOCK // _ROW)[:, None]  # of a block
    in_block = rows * _ROW + tl.arange(0, _ROW)[None, :]
    lane = tile * BLOCK + in_block
    first = tile.to(tl.int64) * BLOCK * _DRAWS
    if SCALES:
        scale = tl.load(grad_scale_ptr)
        numel = tl.where(scale > 0, numel, 0)  # 0 or NaN: the step is skipped
    if DRAWS:
        draws = tl.philox(seed, lane, lane * 0 + step, lane * 0 + place, lane * 0)
    moment_draws = tl.philox(seed, lane, lane * 0 + step, lane * 0 + place, lane * 0 + 1)
    m_scale, v_scale = 0.0, 0.0
    for i in tl.static_range(_DRAWS):
        at = first + i * BLOCK + in_block
        row = (first + i * BLOCK) // _ROW + rows
        inside, begun = at < numel, row * _ROW < numel
        if CODES:
            m_scale = tl.load(exp_avg_scale_ptr + row, begun, other=0)
            v_scale = tl.load(exp_avg_sq_scale_ptr + row, begun, other=0)
        p = _read_weight(param_ptr, remainder_ptr, at, inside, SPLIT, DRAWS)
        g = tl.load(grad_ptr + at, inside, other=0).to(tl.float32)
        if SCALES:
            g *= scale
        m = _read_moment(exp_avg_ptr, m_scale, at, inside, CODES, False)
        v = _read_moment(exp_avg_sq_ptr, v_scale, at, inside, CODES, True)
        p, m, v = _moved(p, g, m, v, decay, step_size, rest1, beta2, rest2, scale2, eps)
        if CODES:
            m_scale, v_scale = _row_scale(m), _row_scale(v)
            tl.store(exp_avg_scale_ptr + row, m_scale, begun)
            tl.store(exp_avg_sq_scale_ptr + row, v_scale, begun)
        draw = moment_draws[i]
        _write_moment(m, m_scale, draw, exp_avg_ptr, at, inside, CODES, False)
        _write_moment(v, v_scale, draw >> 16, exp_avg_sq_ptr, at, inside, CODES, True)
        draw = draws[i] if DRAWS else 0
        _write_weight(p, draw, param_ptr, remainder_ptr, at, inside, SPLIT, DRAWS)


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    remainders: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    grad_scale: Tensor | None,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    step_size = learning_rate / (1 - beta1**step)
    scale2 = (1 - beta2**step) ** -0.5
    settings = learning_rate * weight_decay, step_size, 1 - beta1, beta2, 1 - beta2, scale2, eps
    block, num_warps = launch.flat_tile(exp_avgs[0].new_empty(0, dtype=float32))
    block //= _DRAWS.value
    grads = [grad.contiguous() for grad in grads]
    scales = [exp_avg_scales, exp_avg_sq_scales] if exp_avg_scales else []
    lists = [params, remainders or params, grads, exp_avgs, exp_avg_sqs, *scales]
    kernel = _adamw_kernel if exp_avgs[0].dtype == float32 else _adamw_rounding_kernel
    modes = {
        "WEIGHT": tl.int16 if params[0].dtype == bfloat16 else tl.float32,
        "GRAD": tl.bfloat16 if grads[0].dtype == bfloat16 else tl.float32,
        "MOMENT": _MOMENTS[exp_avgs[0].dtype],
        "SCALES": grad_scale is not None,
        "SPLIT": bool(remainders),
        "DRAWS": params[0].dtype == bfloat16 and not remainders,
    }
    for table in tensor_tables(lists, _DRAWS.value * block):
        kernel[(table.num_tiles,)](
            table.rows, table.rows if grad_scale is None else grad_scale, *settings, step,
            0 if seed is None else seed, NUM=table.num_columns, ALIGNED=table.aligned, BLOCK=block,
            **modes, num_warps=num_warps // 2, enable_fp_fusion=False,
        )  # fmt: skip
