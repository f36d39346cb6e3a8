"""AdamW in plain PyTorch: torch's fused kernel between reading and writing of compressed state."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adamw import (
    BLOCK,
    DROPPED_BITS,
    FIRST,
    LARGEST,
    SECOND,
    SMALLEST_SCALE,
    MomentCode,
    join_master,
    split_master,
    upper_half,
)

_CACHED_ELEMENTS = 1 << 18  # elements whose fp32 copies stay in the cache between passes
Draw = Callable[[int], Tensor]  # n -> (n,) int32 random numbers in [0, 2^16)


def _round(x: Tensor, rounded: Tensor, draw: Draw) -> None:
    rounded.copy_(upper_half(x, draw(len(x))))


def adamw_update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    remainders: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor],
    grad_scale: Tensor | None, step: int, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, seed: int | None,
) -> None:  # fmt: skip
    if grad_scale is not None and not grad_scale > 0:  # 0 or NaN: the step is skipped
        return
    # torch's kernel divides by it
    divisor = None if grad_scale is None else grad_scale.reciprocal()
    count = torch.tensor(float(step), device=params[0].device)

    def update(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor]):
        torch._fused_adamw_(
            params, grads, ms, vs, [], [count] * len(params), lr=learning_rate, beta1=beta1,
            beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            grad_scale=divisor,
        )  # fmt: skip

    if params[0].dtype == exp_avgs[0].dtype == torch.float32:
        update(params, grads, exp_avgs, exp_avg_sqs)
        return
    draw = _draws((seed or 0) * 1_000_003 + step, params[0].device)  # without a seed none is made
    for i, whole in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        for elements, blocks in _parts(params[i].numel()):
            param, grad, m, v = (x.view(-1)[elements] for x in whole)
            remainder = remainders[i].view(-1)[elements] if remainders else None
            scales = [
                x[i].view(-1)[blocks] if x else None for x in (exp_avg_scales, exp_avg_sq_scales)
            ]
            # the parameter itself, an upcast copy, or the exact master
            p32 = param.float() if remainder is None else join_master(param, remainder)
            m32, v32 = (
                x.float() if scale is None else decode(x, scale, code)
                for x, scale, code in zip((m, v), scales, (FIRST, SECOND), strict=True)
            )
            update([p32], [grad.to(torch.float32, copy=True)], [m32], [v32])
            for x32, x, scale, code in ((m32, m, scales[0], FIRST), (v32, v, scales[1], SECOND)):
                if scale is not None:
                    _write_codes(x32, x, scale, code, draw)
                elif x.dtype != torch.float32:  # updated in place
                    _round(x32, x, draw)
            if remainder is not None:
                high, low = split_master(p32)
                param.copy_(high)
                remainder.copy_(low)
            elif param.dtype != torch.float32:
                _round(p32, param, draw)


def _draws(seed: int, device: torch.device) -> Draw:
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "dtype": torch.int32, "device": device}
    return lambda num: torch.randint(1 << 16, (num,), **options)


def _parts(numel: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a tensor of numel elements, and of its scales, one per block."""
    for begin in range(0, numel, _CACHED_ELEMENTS):
        end = begin + _CACHED_ELEMENTS
        yield slice(begin, end), slice(begin // BLOCK, end // BLOCK)


def _write_codes(x32: Tensor, codes: Tensor, scales: Tensor, code: MomentCode, draw: Draw) -> None:
    new_codes, new_scales = encode(x32, draw(len(x32)), code)
    codes.copy_(new_codes)
    scales.copy_(new_scales)


def encode(x: Tensor, draws: Tensor, code: MomentCode) -> tuple[Tensor, Tensor]:
    """fp32 x (numel,) -> codes (numel,) uint8 and scales (num_blocks,) fp32.

    draws (numel,) int32 in [0, 2^16). A block with a NaN has the scale NaN and stays NaN.
    """
    sizes = _blocks(x.view(torch.int32) & 0x7FFFFFFF)  # as integers, NaN is above all numbers
    scales = (sizes.amax(1).view(torch.float32) * (1 / LARGEST)).clamp_(min=SMALLEST_SCALE)
    ratios = sizes.view(torch.float32) * (1 / scales)[:, None] * 2.0**-code.shift
    bits = ratios.view(torch.int32) + (_blocks(draws) << (DROPPED_BITS - 16))
    codes = (bits >> DROPPED_BITS).clamp_(max=code.largest)
    if code.signed:
        codes |= (_blocks(x.view(torch.int32)) < 0).int() << 7
    else:
        codes = torch.where(sizes == 0, 0, codes.clamp_(min=1))
    return codes.view(-1)[: len(x)].to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, code: MomentCode) -> Tensor:
    """The fp32 numbers of encode's results, (numel,)."""
    codes = codes.int()
    sizes = ((codes & code.largest) << DROPPED_BITS).view(torch.float32) * 2.0**code.shift
    sizes = (_blocks(sizes) * scales[:, None]).view(-1)[: len(codes)]
    return torch.where(codes > code.largest, -sizes, sizes) if code.signed else sizes


def _blocks(x: Tensor) -> Tensor:
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
