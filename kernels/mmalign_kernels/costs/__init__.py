"""Bytes and FLOPs of every operation: what any implementation needs, and what the kernels do.

`bytes` and `flops` are the roofline bound of any implementation: every operand read once, every
result written once, and the arithmetic of the formula. `moved_bytes` and `done_flops` are those of
the Triton kernels on sm_90, counted from their loads and stores: a tensor once per kernel that
reads it and once per kernel that writes it. What a kernel reads again while L2 (50 MB) holds it
does not count; a larger matrix counts each time it is streamed.

A multiplication, addition, exponential, division or root is one FLOP; of the operations that
multiply matrices only the products count. itemsize: bytes per element of the activations.
"""

from typing import Literal

from ..adamw import num_blocks
from .attention import (
    attention_pairs,
    full_attention_backward,
    full_attention_forward,
    prefix_attention_forward,
    rotary_attention_backward,
    rotary_attention_forward,
)
from .cost import Cost, partial_rows
from .products import (
    linear_backward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_forward,
    project_image_features_backward,
    project_image_features_forward,
    target_logprobs_forward,
)

__all__ = [
    "Cost",
    "attention_pairs",
    "full_attention_backward",
    "full_attention_forward",
    "linear_backward",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_forward",
    "prefix_attention_forward",
    "project_image_features_backward",
    "project_image_features_forward",
    "rotary_attention_backward",
    "rotary_attention_forward",
    "target_logprobs_forward",
]


def _memory_bound(required: int, flops: int, extra: int = 0) -> Cost:
    """extra: bytes that the kernels move beyond the required ones."""
    return Cost(required, flops, required + extra, flops)


# norms


def rms_norm_forward(tokens: int, hidden_size: int, itemsize: int) -> Cost:
    numel = tokens * hidden_size
    return _memory_bound((2 * numel + hidden_size) * itemsize, 4 * numel, extra=4 * tokens)


def add_rms_norm_forward(tokens: int, hidden_size: int, itemsize: int) -> Cost:
    """The sum is a result: whatever follows reads it."""
    numel = tokens * hidden_size
    return _memory_bound((4 * numel + hidden_size) * itemsize, 5 * numel, extra=4 * tokens)


def rms_norm_backward(
    tokens: int, hidden_size: int, itemsize: int, needs_weight: bool = True
) -> Cost:
    return _norm_backward(3, 7, tokens, hidden_size, itemsize, needs_weight)


def add_rms_norm_backward(
    tokens: int, hidden_size: int, itemsize: int, needs_weight: bool = True
) -> Cost:
    """The residual's gradient is one more operand."""
    return _norm_backward(4, 8, tokens, hidden_size, itemsize, needs_weight)


def _norm_backward(
    tensors: int, flops: int, tokens: int, hidden_size: int, itemsize: int, needs_weight: bool
) -> Cost:
    numel = tokens * hidden_size
    required = (tensors * numel + (1 + needs_weight) * hidden_size) * itemsize
    partial = partial_rows(tokens, hidden_size, itemsize) if needs_weight else 0
    return _memory_bound(required, (flops + 2 * needs_weight) * numel, 4 * tokens + partial)


def layer_norm_forward(tokens: int, hidden_size: int, itemsize: int) -> Cost:
    numel = tokens * hidden_size
    return _memory_bound((2 * numel + 2 * hidden_size) * itemsize, 7 * numel)


def layer_norm_backward(tokens: int, hidden_size: int, itemsize: int) -> Cost:
    numel = tokens * hidden_size
    required = (3 * numel + 3 * hidden_size) * itemsize
    return _memory_bound(required, 16 * numel, 2 * partial_rows(tokens, hidden_size, itemsize))


# activations


def swiglu_forward(tokens: int, intermediate_size: int, itemsize: int) -> Cost:
    numel = tokens * intermediate_size
    return _memory_bound(3 * numel * itemsize, 5 * numel)


def swiglu_backward(tokens: int, intermediate_size: int, itemsize: int) -> Cost:
    numel = tokens * intermediate_size
    return _memory_bound(5 * numel * itemsize, 11 * numel)


def quick_gelu_forward(numel: int, itemsize: int) -> Cost:
    return _memory_bound(2 * numel * itemsize, 5 * numel)


def quick_gelu_backward(numel: int, itemsize: int) -> Cost:
    return _memory_bound(3 * numel * itemsize, 10 * numel)


# rows


def pack_rows_forward(num_packed: int, columns: int, itemsize: int) -> Cost:
    """Indices: 8 bytes each."""
    return _memory_bound(num_packed * (2 * columns * itemsize + 8), 0)


def pack_rows_backward(num_packed: int, num_rows: int, columns: int, itemsize: int) -> Cost:
    """Extra: sorted indices and their order (8 bytes each), written and read; where rows begin."""
    required = (num_packed + num_rows) * columns * itemsize + 8 * num_packed
    return _memory_bound(required, num_packed * columns, 32 * num_packed + 24 * num_rows)


def unpack_rows_forward(num_packed: int, num_rows: int, columns: int, itemsize: int) -> Cost:
    """Extra: the inverse of the indices, 4 bytes per row, filled, written and read."""
    required = (num_packed + num_rows) * columns * itemsize + 8 * num_packed
    return _memory_bound(required, 0, 8 * num_rows + 4 * num_packed)


def unpack_rows_backward(num_packed: int, columns: int, itemsize: int) -> Cost:
    return pack_rows_forward(num_packed, columns, itemsize)


# optimizer

Weights = Literal["fp32", "split", "stochastic"]  # how AdamW keeps them


def adamw_step(
    numel: int,
    mode: Weights,
    grad_itemsize: int | None = None,
    moments: Literal["fp32", "bf16", "8bit"] = "fp32",
) -> Cost:
    """fp32 weights; bf16 with split master (16-bit remainders); bf16 with stochastic rounding.

    grad_itemsize: default that of the weights.
    """
    weight = {"fp32": 4, "split": 4, "stochastic": 2}[mode]  # a remainder is read and written, too
    grad = grad_itemsize or (4 if mode == "fp32" else 2)
    moment_bytes = (
        4 * {"fp32": 4 * numel, "bf16": 2 * numel, "8bit": numel + 4 * num_blocks(numel)}[moments]
    )  # two, read and written
    return _memory_bound(numel * (2 * weight + grad) + moment_bytes, 15 * numel)
