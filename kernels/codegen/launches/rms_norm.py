"""RMSNorm at the widths of CLIP ViT-L/14, OpenLLaMA-3B, LLaMA2-7B and twice that."""

import torch
from mmalign_kernels.triton.rms_norm import add_rms_norm_fwd, rms_norm_bwd, rms_norm_fwd

from ..compiler import meta

ROWS = 16384
WIDTHS = (1024, 3200, 4096, 8192)
MEMORY_BOUND = {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"}
PERSISTENT = {"_rms_norm_bwd_kernel"}
READERS = {"_column_sum_kernel"}


def _launches(columns):
    x, weight, rstd = meta(ROWS, columns), meta(columns), meta(ROWS, 1, dtype=torch.float32)
    return {
        f"rms_norm {columns}": lambda: rms_norm_fwd(x, weight, 1e-5),
        f"add_rms_norm {columns}": lambda: add_rms_norm_fwd(x, x, weight, 1e-5),
        f"add_rms_norm backward {columns}": lambda: rms_norm_bwd(x, x, x, weight, rstd, True),
        f"add_rms_norm backward {columns}, frozen": lambda: rms_norm_bwd(
            x, x, x, weight, rstd, False
        ),
    }


LAUNCHES = {name: run for columns in WIDTHS for name, run in _launches(columns).items()}
