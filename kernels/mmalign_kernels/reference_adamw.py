"""AdamW in plain PyTorch: torch's fused kernel, and around it the ways to keep weights and moments
in fewer bits."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import block_quantization as codes
from .adamw import join_master, split_master, upper_half

_BLOCK = 1 << 18  # elements whose fp32 copies stay in the cache between the passes
_Draw = Callable[[int], Tensor]  # so many random numbers in [0, 2^16), int32


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
    if grad_scale is not None and not grad_scale > 0:  # 0 or NaN: the step is skipped
        return
    divisor = None if grad_scale is None else grad_scale.reciprocal()  # the kernel divides by it
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
    draw = None if seed is None else _draws(seed * 1_000_003 + step, params[0].device)
    state = remainders, exp_avg_scales, exp_avg_sq_scales
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        for part in _parts(*tensors, *(x[i] if x else None for x in state)):
            param, grad, m, v, remainder, *scales = part
            wide = _wide_param(param, remainder)
            wide_m, wide_v = (
                _wide_moment(x, scale, code)
                for x, scale, code in zip((m, v), scales, (codes.FIRST, codes.SECOND), strict=True)
            )
            update([wide], [grad.to(torch.float32, copy=True)], [wide_m], [wide_v])
            _keep_moment(wide_m, m, scales[0], codes.FIRST, draw)
            _keep_moment(wide_v, v, scales[1], codes.SECOND, draw)
            _keep_param(wide, param, remainder, draw)


def _draws(seed: int, device: torch.device) -> _Draw:
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "dtype": torch.int32, "device": device}
    return lambda num: torch.randint(1 << 16, (num,), **options)


def _parts(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Corresponding pieces; scales, the last two, have an element for every block of codes."""
    flat = [None if x is None else x.view(-1) for x in tensors]
    sizes = [_BLOCK] * (len(flat) - 2) + [_BLOCK // codes.BLOCK] * 2
    for i in range(-(-len(flat[0]) // _BLOCK)):
        yield tuple(
            None if x is None else x[i * size : (i + 1) * size]
            for x, size in zip(flat, sizes, strict=True)
        )


def _wide_param(param: Tensor, remainder: Tensor | None) -> Tensor:
    """fp32: the parameter itself, a copy of bf16, or the exact master."""
    return param.float() if remainder is None else join_master(param, remainder)


def _keep_param(wide: Tensor, param: Tensor, remainder: Tensor | None, draw: _Draw | None) -> None:
    if param.dtype == torch.float32:
        return  # updated in place
    if remainder is None:
        param.copy_(upper_half(wide, draw(len(wide))))
        return
    weight, low = split_master(wide)
    param.copy_(weight)
    remainder.copy_(low)


def _wide_moment(moment: Tensor, scales: Tensor | None, code: codes.MomentCode) -> Tensor:
    return moment.float() if scales is None else codes.decode(moment, scales, code)


def _keep_moment(
    wide: Tensor,
    moment: Tensor,
    scales: Tensor | None,
    code: codes.MomentCode,
    draw: _Draw | None,
) -> None:
    if moment.dtype == torch.float32:
        return  # updated in place
    if scales is None:
        moment.copy_(upper_half(wide, draw(len(wide))))
        return
    new_codes, new_scales = codes.encode(wide, draw(len(wide)), code)
    moment.copy_(new_codes)
    scales.copy_(new_scales)
