"""AdamW by the CUDA kernels of csrc/adamw.cu: a whole list of parameters in a few launches."""

from torch import Tensor

from .library import fake, operation


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
    grads = [grad.contiguous() for grad in grads]
    scales = exp_avg_scales, exp_avg_sq_scales
    settings = step, learning_rate, beta1, beta2, eps, weight_decay, seed
    operation("adamw_update")(
        params, grads, exp_avgs, exp_avg_sqs, remainders, *scales, grad_scale, *settings
    )


fake("adamw_update", lambda *args: None)  # in place
