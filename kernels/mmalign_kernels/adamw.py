"""AdamW, one pass per parameter: Loshchilov and Hutter 2019 (arXiv 1711.05101).

    p -= learning_rate * weight_decay * p
    m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p -= learning_rate / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

Weights are fp32; or bf16 with the low 16 bits of an exact fp32 master beside them; or bf16 alone,
rounded at random so that the expected weight is the exact one. Moments and arithmetic are fp32.
"""

import torch
from torch import Tensor

from .checks import check_shape
from .operation import Operation


def _declare(
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
    """The step, in place; remainders may be an empty list; grads may be overwritten."""


_declare.__name__ = "adamw_update"
adamw_update = Operation(
    _declare, mutates=("params", "grads", "exp_avgs", "exp_avg_sqs", "remainders")
)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> bf16 weight (nearest, ties away from zero) and int16 remainder, any shape.

    Read as integers, weight * 2^16 + remainder is the fp32 number, bit for bit.
    """
    bits = master.contiguous().view(torch.int32)
    weight = ((bits + 0x8000) >> 16).to(torch.int16)
    return weight.view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 number that split_master split."""
    return (weight.view(torch.int16).int() << 16).add_(remainder).view(torch.float32)


def _check(
    params: list[Tensor],
    lists: dict[str, list[Tensor]],
    remainders: list[Tensor] | None,
    seed: int | None,
) -> None:
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {len(params)} params, but {len(tensors)} {name}")
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            check_shape("adamw_step", param.shape, f"params[{i}]", **{f"{name}[{i}]": tensor})
            allowed = {"remainders": (torch.int16,), "grads": (torch.float32, param.dtype)}
            if tensor.dtype not in allowed.get(name, (torch.float32,)):
                raise ValueError(f"adamw_step: {name}[{i}] is {tensor.dtype} beside {param.dtype}")
    for i, param in enumerate(params):
        if param.dtype != params[0].dtype or not param.is_contiguous():
            raise ValueError(f"adamw_step: params[{i}] is of another type, or not contiguous")
    num_modes = (remainders is not None) + (seed is not None)
    expected = {torch.float32: 0, torch.bfloat16: 1}.get(params[0].dtype)
    if num_modes != expected:
        raise ValueError(
            f"adamw_step: params are {params[0].dtype}. fp32 takes neither remainders nor seed, "
            "bf16 takes one of them"
        )


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    remainders: list[Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """One step of AdamW, in place; step counts from 1.

    params are contiguous and of one type; the other lists have their shapes. fp32 params; or bf16
    params with remainders (int16, see split_master); or bf16 params with seed: rounded at random,
    the same for the same seed and step. grads fp32 or the params' type, and may be overwritten;
    exp_avgs, exp_avg_sqs fp32. grad_scale: (), fp32, on the device; every gradient is multiplied
    by it, and where it is 0 or NaN nothing changes at all. Raises ValueError where lists, shapes or types do not fit.
    """
    if not params:
        return
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if remainders is not None:
        lists["remainders"] = remainders
    _check(params, lists, remainders, seed)
    adamw_update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        remainders or [],
        grad_scale,
        step,
        learning_rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        seed,
    )
