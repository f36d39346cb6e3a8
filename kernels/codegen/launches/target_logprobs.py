"""Scoring with lm_head of LLaMA2-7B and OpenLLaMA-3B."""

import torch
from mmalign_kernels.triton.target_logprobs import target_logprobs_fwd

from ..compiler import meta

ROWS, TARGETS = 16384, 20000
SHAPES = ((4096, 32000), (4096, 32003), (3200, 32000))  # hidden_size, vocab_size
MEMORY_BOUND = {"_gather_rows_kernel"}
READERS = {"_target_logprobs_kernel"}
MATRIX = {"_row_statistics_kernel"}


def _launches(hidden_size, vocab_size):
    hidden_states, weight = meta(ROWS, hidden_size), meta(vocab_size, hidden_size)
    targets = meta(TARGETS, dtype=torch.int64)
    name = f"target_logprobs {hidden_size} x {vocab_size}"
    return {name: lambda: target_logprobs_fwd(hidden_states, weight, targets, targets)}


LAUNCHES = {name: run for shape in SHAPES for name, run in _launches(*shape).items()}
