"""AdamW on a matrix of LLaMA2-7B, in every format of weights and moments."""

import torch
from mmalign_kernels.triton.adamw import adamw_update

from ..compiler import meta

SHAPE = (4096, 4096)
WRITERS = {"_adamw_kernel"}  # four neighbours in the other kernel are 64 or 32 bits


def _step(dtype, remainder=False, seed=None, moments=torch.float32):
    weight = meta(*SHAPE, dtype=dtype)
    exp_avg, exp_avg_sq = ([meta(*SHAPE, dtype=moments)] for _ in range(2))
    remainders = [meta(*SHAPE, dtype=torch.int16)] if remainder else []
    num_scales = 1 if moments == torch.uint8 else 0
    scales, scales_sq = ([meta(4096 * 32, dtype=torch.float32)] * num_scales for _ in range(2))
    state = exp_avg, exp_avg_sq, remainders, scales, scales_sq
    factor, settings = meta(dtype=torch.float32), (5, 1e-3, 0.9, 0.999, 1e-8, 0.1, seed)
    adamw_update([weight], [weight], *state, factor, *settings)


LAUNCHES = {
    "fp32": lambda: _step(torch.float32),
    "bf16, split master": lambda: _step(torch.bfloat16, remainder=True),
    "bf16, stochastic rounding": lambda: _step(torch.bfloat16, seed=3),
    "bf16, stochastic rounding, bf16 moments": lambda: _step(
        torch.bfloat16, seed=3, moments=torch.bfloat16
    ),
    "bf16, split master, 8-bit moments": lambda: _step(
        torch.bfloat16, remainder=True, seed=3, moments=torch.uint8
    ),
    "bf16, stochastic rounding, 8-bit moments": lambda: _step(
        torch.bfloat16, seed=3, moments=torch.uint8
    ),
}
