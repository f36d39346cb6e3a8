"""AdamW on a matrix of LLaMA2-7B, in the ways to keep weights and moments."""

import torch
from mmalign_kernels.adamw_triton import adamw_update

from .codegen import meta

SHAPE = (4096, 4096)
WRITERS = {"_adamw_kernel"}  # of the other kernel four neighbours are 64 bits, or 32


def _step(dtype, remainder=False, seed=None, moments=torch.float32):
    weight = meta(*SHAPE, dtype=dtype)
    states = [[meta(*SHAPE, dtype=moments)] for _ in range(2)]
    remainders = [meta(*SHAPE, dtype=torch.int16)] if remainder else []
    codes = moments == torch.uint8
    scales = [[meta(4096 * 32, dtype=torch.float32)] if codes else [] for _ in range(2)]
    factor, settings = meta(dtype=torch.float32), (5, 1e-3, 0.9, 0.999, 1e-8, 0.1, seed)
    adamw_update([weight], [weight], *states, remainders, *scales, factor, *settings)


LAUNCHES = {
    "fp32": lambda: _step(torch.float32),
    "bf16 with remainder": lambda: _step(torch.bfloat16, remainder=True),
    "bf16 rounded at random": lambda: _step(torch.bfloat16, seed=3),
    "bf16 rounded at random, bf16 moments": lambda: _step(
        torch.bfloat16, seed=3, moments=torch.bfloat16
    ),
    "bf16 with remainder, 8-bit moments": lambda: _step(
        torch.bfloat16, remainder=True, seed=3, moments=torch.uint8
    ),
    "bf16 rounded at random, 8-bit moments": lambda: _step(
        torch.bfloat16, seed=3, moments=torch.uint8
    ),
}
