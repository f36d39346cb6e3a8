"""AdamW on a matrix of LLaMA2-7B, in the three ways to keep weights."""

import torch
from mmalign_kernels.adamw_triton import adamw_update

from .codegen import meta

SHAPE = (4096, 4096)
MEMORY_BOUND = {"_adamw_kernel"}


def _step(dtype, remainder=False, seed=None):
    weight, moment = meta(*SHAPE, dtype=dtype), meta(*SHAPE, dtype=torch.float32)
    remainders = [meta(*SHAPE, dtype=torch.int16)] if remainder else []
    scale = meta(dtype=torch.float32)
    settings = (5, 1e-3, 0.9, 0.999, 1e-8, 0.1, seed)
    adamw_update([weight], [weight], [moment], [moment], remainders, scale, *settings)


LAUNCHES = {
    "fp32": lambda: _step(torch.float32),
    "bf16 with remainder": lambda: _step(torch.bfloat16, remainder=True),
    "bf16 rounded at random": lambda: _step(torch.bfloat16, seed=3),
}
