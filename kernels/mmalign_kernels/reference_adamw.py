"""AdamW in plain PyTorch: torch's fused kernel, and around it the two ways to keep bf16 weights."""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements whose fp32 copies stay in the cache between the passes


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

    if params[0].dtype == torch.float32:
        update(params, grads, exp_avgs, exp_avg_sqs)
        return
    generator = None
    if seed is not None:
        generator = torch.Generator(params[0].device).manual_seed(seed * 1_000_003 + step)
    for i, (param, *tensors) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        remainder = remainders[i] if generator is None else param  # not read when rounding
        for bits, low, grad, m, v in _blocks(param.view(torch.int16), remainder, *tensors):
            wide = bits.int().bitwise_left_shift_(16)
            if generator is None:
                wide.add_(low)
            update([wide.view(torch.float32)], [grad.to(torch.float32, copy=True)], [m], [v])
            if generator is None:
                low.copy_(wide)
                wide.add_(0x8000)
            else:
                wide.add_(torch.randint_like(wide, 1 << 16, generator=generator))
            bits.copy_(wide.bitwise_right_shift_(16))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [x.view(-1) for x in tensors]
    for begin in range(0, flat[0].numel(), _BLOCK):
        yield tuple(x[begin : begin + _BLOCK] for x in flat)
