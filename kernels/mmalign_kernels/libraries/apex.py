"""RMSNorm and AdamW by NVIDIA's apex.

RMSNorm has no residual addition, so that is a pass of its own, forward and backward; and it always
computes the weight's gradient, which a frozen weight discards. AdamW takes many tensors per launch,
in fp32 only: apex rounds bf16 weights to nearest and has no split master, so they are an error.
"""

# pyright: reportMissingImports=false

import torch
from torch import Tensor

from . import check

_CHUNK = 2048 * 32  # elements per program, as in apex's own optimizers
_DECOUPLED_DECAY = 1
_BIAS_CORRECTION = 1


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check("apex", "rms_norm", x)
    import fused_layer_norm_cuda

    y, rstd = fused_layer_norm_cuda.rms_forward_affine(
        x.contiguous(), list(weight.shape), weight.contiguous(), eps
    )
    return y, rstd[:, None]


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    check("apex", "add_rms_norm", x)
    residual = x + residual
    y, rstd = rms_norm_fwd(residual, weight, eps)
    return y, residual, rstd


def rms_norm_bwd(
    grad_y: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check("apex", "rms_norm", x)
    import fused_layer_norm_cuda

    eps, memory_efficient = 0.0, False  # eps is not read, since x was saved
    grad_x, grad_weight = fused_layer_norm_cuda.rms_backward_affine(
        grad_y.contiguous(),
        rstd.flatten(),
        x.contiguous(),
        list(weight.shape),
        weight.contiguous(),
        eps,
        memory_efficient,
    )
    if grad_residual is not None:
        grad_x += grad_residual
    return grad_x, grad_weight if needs_weight else weight.new_empty(0)


def adamw_update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    remainders: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor],
    grad_scale: Tensor | None, step: int, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, seed: int | None,
) -> None:  # fmt: skip
    check("apex", "adamw_step", params[0])
    import amp_C

    if params[0].dtype != torch.float32:
        raise NotImplementedError(
            f"adamw_step: backend apex needs float32 weights, these are {params[0].dtype}: it has "
            "neither split masters nor stochastic rounding. Keep fp32 weights, or name another "
            "backend"
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
    # the variant for CUDA graphs, the only one that reads grad_scale on the device
    rate = torch.full((1,), learning_rate, dtype=torch.float32, device=device)
    steps = torch.full((1,), step, dtype=torch.int32, device=device)
    settings = rate, beta1, beta2, eps, steps
    amp_C.multi_tensor_adam_capturable(_CHUNK, overflow, lists, *settings, *modes, grad_scale)


OPERATIONS = {
    "apex": {
        "rms_norm_fwd": rms_norm_fwd,
        "add_rms_norm_fwd": add_rms_norm_fwd,
        "rms_norm_bwd": rms_norm_bwd,
        "adamw_update": adamw_update,
    }
}
