"""AdamW in Triton: one pass over a parameter and its state, in place.

    p -= learning_rate * weight_decay * p
    m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p -= learning_rate / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

A bf16 weight is read and written as an integer: with its remainder it is the exact fp32 master, by
itself the upper half of one whose lower half is drawn anew and dropped. The draw is Philox's, keyed
by the seed, counted by element, step and place in the list: no state, the same on every rank. One
Philox call gives four numbers, so a program works on four blocks that lie behind each other.
A thread holds four neighbours of a block: 128 bits of every fp32 tensor, 64 of every bf16 one.
(With eight neighbours Triton sends the moments through shared memory before it writes them.)

One launch per tensor. A launch costs the host some 20 us; the 195 to 291 matrices and norms of a 7B
model thus 6 ms while the device works for 30 to 60 ms, and the launches run ahead of it. A table of
pointers would save that where all tensors are small, and cost a copy to the device in every step
and the compiler's knowledge that rows are aligned.

Bytes of an element, gradient in the weight's type: fp32 28, bf16 with remainder 26, bf16 rounded at
random 22.
"""

import triton
import triton.language as tl
from torch import Tensor, bfloat16, int16

from . import launch

_DRAWS = tl.constexpr(4)  # numbers that a Philox call gives


@triton.jit
def _moved(p, g, m, v, decay, step_size, rest1, beta2, rest2, scale2, eps):
    """The new p, m, v of fp32 values; rest = 1 - beta, scale2 = 1 / sqrt(1 - beta2^step)."""
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p -= decay * p
    return p - step_size * m / (tl.sqrt(v) * scale2 + eps), m, v


@triton.jit(do_not_specialize=["step", "place", "seed"])
def _adamw_kernel(
    param_ptr,  # (numel,) fp32, or the bits of bf16
    remainder_ptr,  # (numel,) int16, or unused
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_scale_ptr,  # (), or unused
    numel,
    decay,
    step_size,
    rest1,
    beta2,
    rest2,
    scale2,
    eps,
    step,
    place,
    seed,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    DRAWS: tl.constexpr,
):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * BLOCK * _DRAWS + tl.arange(0, BLOCK)
    if SCALES:
        scale = tl.load(grad_scale_ptr)
        numel = tl.where(scale > 0, numel, 0)  # 0 or NaN: the step is skipped
    if DRAWS:
        draws = tl.philox(seed, lane, lane * 0 + step, lane * 0 + place, lane * 0)
    for i in tl.static_range(_DRAWS):
        at = first + i * BLOCK
        inside = at < numel
        p = tl.load(param_ptr + at, inside, other=0)
        if SPLIT:
            p = (p.to(tl.int32) << 16) + tl.load(remainder_ptr + at, inside, other=0).to(tl.int32)
            p = p.to(tl.float32, bitcast=True)
        elif DRAWS:
            p = (p.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        g = tl.load(grad_ptr + at, inside, other=0).to(tl.float32)
        if SCALES:
            g *= scale
        m = tl.load(exp_avg_ptr + at, inside, other=0)
        v = tl.load(exp_avg_sq_ptr + at, inside, other=0)
        p, m, v = _moved(p, g, m, v, decay, step_size, rest1, beta2, rest2, scale2, eps)
        tl.store(exp_avg_ptr + at, m, inside)
        tl.store(exp_avg_sq_ptr + at, v, inside)
        if SPLIT:
            bits = p.to(tl.int32, bitcast=True)
            tl.store(remainder_ptr + at, bits.to(tl.int16), inside)
            tl.store(param_ptr + at, ((bits + 0x8000) >> 16).to(tl.int16), inside)
        elif DRAWS:
            bits = p.to(tl.int32, bitcast=True) + (draws[i] & 0xFFFF).to(tl.int32)
            tl.store(param_ptr + at, (bits >> 16).to(tl.int16), inside)
        else:
            tl.store(param_ptr + at, p, inside)


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    remainders: list[Tensor],
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
    for place, param in enumerate(params):
        bits = param.view(int16) if param.dtype == bfloat16 else param
        tensors = (
            bits,
            remainders[place] if remainders else bits,
            grads[place],
            exp_avgs[place],
            exp_avg_sqs[place],
        )
        block, num_warps = launch.flat_tile(exp_avgs[place])
        block //= _DRAWS.value
        if param.numel():
            _adamw_kernel[(launch.ceil_div(param.numel(), _DRAWS.value * block),)](
                *(x.view(-1) for x in tensors), param if grad_scale is None else grad_scale,
                param.numel(), *settings, step, place, 0 if seed is None else seed, BLOCK=block,
                SCALES=grad_scale is not None, SPLIT=bool(remainders), DRAWS=seed is not None,
                num_warps=num_warps // 2, enable_fp_fusion=False,
            )  # fmt: skip
