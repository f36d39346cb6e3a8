"""AdamW, one pass per parameter: Loshchilov and Hutter 2019 (arXiv 1711.05101).

    p -= learning_rate * weight_decay * p
    m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p -= learning_rate / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

Plain PyTorch: reference/adamw.py. The arithmetic is fp32. Weights are fp32; or bf16 plus the low 16
bits of an exact fp32 master (split master); or bf16 alone with stochastic rounding, so that the
expected weight is exact. Moments are fp32; or bf16 or 8-bit codes, both with stochastic rounding:
rounded to nearest, a second moment that changes by a thousandth per step would never move.

8-bit codes: blocks of 128 neighbours share an fp32 scale, which maps the largest number of the
block to the largest code (after Dettmers et al. 2022, arXiv 2110.02861) and is at least fp32's
smallest normal number, so its reciprocal is finite. A code is a small floating-point number below 2
whose lowest exponent is subnormal, so it needs no table. The same format as
csrc/block_quantization.h:

    first moment    sign, 4 bits of exponent, 3 of mantissa
    second moment   5 bits of exponent, 3 of mantissa; a positive number never rounds to zero
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .operation import check_shape, mutating

_STATE = ("exp_avgs", "exp_avg_sqs", "remainders", "exp_avg_scales", "exp_avg_sq_scales")
BLOCK = 128  # elements that share a scale
MANTISSA_BITS = 3
DROPPED_BITS = 23 - MANTISSA_BITS  # of fp32's mantissa
LARGEST = 2 - 2.0**-MANTISSA_BITS
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class MomentCode:
    exponent_bits: int
    signed: bool

    @property
    def shift(self) -> int:
        """log2 of the smallest normal code over fp32's smallest normal number."""
        return 126 - (2**self.exponent_bits - 2)

    @property
    def largest(self) -> int:
        return 2 ** (self.exponent_bits + MANTISSA_BITS) - 1


FIRST, SECOND = MomentCode(4, signed=True), MomentCode(5, signed=False)


def num_blocks(numel: int) -> int:
    """Number of scales of a tensor of numel elements; the last block may be partial."""
    return -(-numel // BLOCK)


@mutating("params", "grads", *_STATE)
def adamw_update(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    remainders: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor],
    grad_scale: Tensor | None, step: int, learning_rate: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, seed: int | None,
) -> None:  # fmt: skip
    """One step, in place; remainders and scales may be empty lists; grads may be overwritten."""


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> bf16 weight (nearest, ties away from zero) and int16 remainder, any shape.

    Read as integers, weight * 2^16 + remainder is the fp32 number, bit for bit. A NaN becomes the
    quiet NaN, so that the weight alone is a NaN, too.
    """
    master = master.contiguous()
    remainder = master.view(torch.int32).to(torch.int16).masked_fill_(master.isnan(), 0)
    return upper_half(master, 0x8000), remainder


def upper_half(x: Tensor, carried: Tensor | int) -> Tensor:
    """fp32 -> bf16: the upper 16 bits of x's bits plus `carried`, which is below 2^16.

    A NaN stays a NaN: a GPU's has all bits set, and the sum would wrap to zero.
    """
    bits = ((x.view(torch.int32) + carried) >> 16).to(torch.int16)
    return bits.masked_fill_(x.isnan(), _BF16_NAN).view(torch.bfloat16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of split_master."""
    return (weight.view(torch.int16).int() << 16).add_(remainder).view(torch.float32)


_MOMENTS = (torch.float32, torch.bfloat16, torch.uint8)
_BF16_NAN = 0x7FC0


def _allowed(name: str, lists: dict[str, list[Tensor]]) -> tuple[torch.dtype, ...]:
    """The dtypes of a list."""
    if name == "exp_avgs":
        return _MOMENTS
    if name in ("grads", "exp_avg_sqs"):
        return (lists["grads" if name == "grads" else "exp_avgs"][0].dtype,)
    return (torch.int16,) if name == "remainders" else (torch.float32,)


def _check_lists(params: list[Tensor], lists: dict[str, list[Tensor]]) -> None:
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {len(params)} params, but {len(tensors)} {name}")
        scales, allowed = name.endswith("_scales"), _allowed(name, lists)
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if scales and tensor.numel() != num_blocks(param.numel()):
                raise ValueError(
                    f"adamw_step: {name}[{i}] has {tensor.numel()} elements, params[{i}] with "
                    f"{param.numel()} needs {num_blocks(param.numel())}"
                )
            if not scales and tensor.shape != param.shape:
                check_shape("adamw_step", param.shape, f"params[{i}]", **{f"{name}[{i}]": tensor})
            if tensor.dtype not in allowed:
                raise ValueError(f"adamw_step: {name}[{i}] is {tensor.dtype}, params {param.dtype}")
            if name != "grads" and not tensor.is_contiguous():
                raise ValueError(f"adamw_step: {name}[{i}] is not contiguous")
    for i, (param, moment) in enumerate(zip(params, lists["exp_avgs"], strict=True)):
        same = param.dtype == params[0].dtype and moment.dtype == lists["exp_avgs"][0].dtype
        if not same or not param.is_contiguous():
            raise ValueError(f"adamw_step: params[{i}] has another dtype or is not contiguous")


def _check_modes(
    param: Tensor, grad: Tensor, moment: Tensor, splits: bool, scales: bool, seed: bool
) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adamw_step: params are {param.dtype}, expected fp32 or bf16")
    if grad.dtype not in (torch.float32, param.dtype):
        raise ValueError(f"adamw_step: grads are {grad.dtype} for {param.dtype} params")
    if splits and param.dtype == torch.float32:
        raise ValueError("adamw_step: fp32 params take no remainders")
    if scales != (moment.dtype == torch.uint8):
        raise ValueError(
            f"adamw_step: moments are {moment.dtype}; only 8-bit codes take scales, and need them"
        )
    rounds = (param.dtype == torch.bfloat16 and not splits) or moment.dtype != torch.float32
    if rounds and not seed:
        raise ValueError(
            "adamw_step: bf16 params without remainders and moments below fp32 are stored with "
            "stochastic rounding, which needs a seed"
        )
    if seed and not rounds:
        raise ValueError("adamw_step: a seed was passed, but nothing here uses stochastic rounding")


@torch.no_grad()
def adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *,
    step: int, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    grad_scale: Tensor | None = None, remainders: list[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None, exp_avg_sq_scales: list[Tensor] | None = None,
    seed: int | None = None,
) -> None:  # fmt: skip
    """One step of AdamW, in place; step counts from 1.

    All tensors but grads are contiguous; those of a list have one dtype, and the params' shapes.
    params fp32; bf16 with remainders (int16, see split_master); or bf16 alone. grads fp32 or the
    params' dtype, and may be overwritten. exp_avgs and exp_avg_sqs fp32; bf16; or uint8 codes with
    fp32 scales, one per 128 neighbours of the flat parameter. bf16 params alone, bf16 moments and
    codes use stochastic rounding, the same for the same seed and step. grad_scale: (), fp32, on the
    device; multiplies every gradient, and if it is 0 or NaN the step changes nothing.
    Raises ValueError if lists, shapes or dtypes do not match.
    """
    if not params:
        return
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    given = {
        "remainders": remainders,
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
    }
    lists |= {name: tensors for name, tensors in given.items() if tensors is not None}
    _check_lists(params, lists)
    scales = [x is not None for x in (exp_avg_scales, exp_avg_sq_scales)]
    if scales[0] != scales[1]:
        raise ValueError("adamw_step: scales were passed for one moment only; pass both or neither")
    given_modes = remainders is not None, scales[0], seed is not None
    _check_modes(params[0], grads[0], exp_avgs[0], *given_modes)
    adamw_update(
        params, grads, exp_avgs, exp_avg_sqs, *(tensors or [] for tensors in given.values()),
        grad_scale, step, learning_rate, beta1, beta2, eps, weight_decay, seed,
    )  # fmt: skip
