"""AdamW by csrc/cpu/adamw.cpp: a whole list of parameters in one pass."""

import torch
from torch import Tensor

from .library import operation

PART = 1 << 18  # elements that share keys, as in csrc/cpu/adamw.cpp


def adamw_update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    remainders: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor],
    grad_scale: Tensor | None, step: int, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, seed: int | None,
) -> None:  # fmt: skip
    grads = [grad.contiguous() for grad in grads]
    narrow = [x[0].dtype != torch.float32 for x in (exp_avgs, exp_avg_sqs, params)]
    num_rounded = sum(narrow[: 2 if remainders else 3])
    keys = _keys(params, num_rounded, (seed or 0) * 1_000_003 + step)
    operation("adamw_update")(
        params, grads, exp_avgs, exp_avg_sqs, remainders, exp_avg_scales, exp_avg_sq_scales,
        grad_scale, keys, step, learning_rate, beta1, beta2, eps, weight_decay,
    )  # fmt: skip


def _keys(params: list[Tensor], num_rounded: int, seed: int) -> Tensor:
    """32 random bits, as two numbers below 2^16, for each part of each rounded tensor."""
    if not num_rounded:
        return torch.empty(0, dtype=torch.int32)
    parts = sum(-(-param.numel() // PART) for param in params)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << 16, (parts, num_rounded, 2), generator=generator, dtype=torch.int32)
