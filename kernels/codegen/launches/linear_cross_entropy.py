"""lm_head and loss of LLaMA2-7B (with the three image tokens, too) and OpenLLaMA-3B."""

import torch
from mmalign_kernels.triton.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)

from ..compiler import meta

ROWS = 16384
SHAPES = ((4096, 32000), (4096, 32003), (3200, 32000))  # hidden_size, vocab_size
MEMORY_BOUND = {"_gather_rows_kernel", "_softmax_gradient_kernel", "_scale_kernel"}
MATRIX = {"_row_statistics_kernel", "_hidden_gradient_kernel", "_weight_gradient_kernel"}


def _launches(hidden_size, vocab_size):
    hidden_states, weight = meta(ROWS, hidden_size), meta(vocab_size, hidden_size)
    target_ids = meta(ROWS, dtype=torch.int64)
    grad_weight = meta(vocab_size, hidden_size, dtype=torch.float32)
    grad_loss = meta(dtype=torch.float32)
    head = (hidden_states, weight, target_ids)
    name = f"linear_cross_entropy {hidden_size} x {vocab_size}"
    launches = {name: lambda: linear_cross_entropy_fwd(*head, True, True)}
    if (hidden_size, vocab_size) == SHAPES[0]:  # one that stands for the others
        launches |= {
            f"{name}, no gradient": lambda: linear_cross_entropy_fwd(*head, False, False),
            f"{name}, backward": lambda: linear_cross_entropy_bwd(
                hidden_states, grad_weight, grad_loss
            ),
        }
    return launches


LAUNCHES = {name: run for shape in SHAPES for name, run in _launches(*shape).items()}
