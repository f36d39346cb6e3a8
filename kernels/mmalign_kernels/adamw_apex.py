"""AdamW by NVIDIA's apex: one launch for many tensors, fp32 only.

Its bf16 weights are rounded to nearest and have no remainder: neither of the two ways that
adamw_step keeps them, so they are an error here.
"""

import amp_C
import torch
from torch import Tensor

from .libraries import check

_CHUNK = 2048 * 32  # elements of a program, as in apex's own optimizers
_DECOUPLED_DECAY = 1
_BIAS_CORRECTION = 1


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
    check("apex", "adamw_step", params[0])
    if params[0].dtype != torch.float32:
        raise NotImplementedError(
            f"adamw_step: backend apex needs float32 weights, these are {params[0].dtype}: it has "
            "neither remainders nor random rounding. Keep fp32 weights, or name another backend"
        )
    if exp_avgs[0].dtype != torch.float32:
        raise NotImplementedError(
            f"adamw_step: backend apex needs float32 moments, these are {exp_avgs[0].dtype}. "
            "Name another backend"
        )
    device = params[0].device
    lists = [grads, params, exp_avgs, exp_avg_sqs]
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    modes = _DECOUPLED_DECAY, _BIAS_CORRECTION, weight_decay
    if grad_scale is None:
        settings = learning_rate, beta1, beta2, eps, step
        amp_C.multi_tensor_adam(_CHUNK, overflow, lists, *settings, *modes)
        return
    # the form for CUDA graphs: it alone reads the gradients' factor on the device
    rate = torch.full((1,), learning_rate, dtype=torch.float32, device=device)
    steps = torch.full((1,), step, dtype=torch.int32, device=device)
    settings = rate, beta1, beta2, eps, steps
    amp_C.multi_tensor_adam_capturable(_CHUNK, overflow, lists, *settings, *modes, grad_scale)
