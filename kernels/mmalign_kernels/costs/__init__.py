"""Bytes and FLOPs of the operations: what any implementation needs, and what the kernels do.

`bytes` and `flops` are the roofline bound of any implementation: every operand read once, every
result written once, and the arithmetic of the formula. `moved_bytes` and `done_flops` are those of
the Triton kernels on sm_90, counted from their loads and stores: a tensor once per kernel that
reads it and once per kernel that writes it. What a kernel reads again while L2 (50 MB) holds it
does not count; a larger matrix counts each time it is streamed.

A multiplication, addition, exponential, division or root is one FLOP; of the operations that
multiply matrices only the products count. itemsize: bytes per element of the activations. One
function per operation, (forward, backward): attention.py, products.py (weights), and here the rest.
"""

from typing import Literal

from ..adamw import num_blocks
from .attention import attention_pairs, full_attention, rotary_attention
from .cost import Cost, Passes, partial_rows
from .products import linear_cross_entropy, project_image_features, target_logprobs

__all__ = [
    "Cost",
    "Passes",
    "attention_pairs",
    "full_attention",
    "linear_cross_entropy",
    "project_image_features",
    "rotary_attention",
    "target_logprobs",
]


def _memory_bound(required: int, flops: int, extra: int = 0) -> Cost:
    """extra: bytes that the kernels move beyond the required ones."""
    return Cost(required, flops, required + extra, flops)


# norms


def rms_norm(tokens: int, hidden_size: int, itemsize: int, needs_weight: bool = True) -> Passes:
    return _rms_norm(0, tokens, hidden_size, itemsize, needs_weight)


def add_rms_norm(tokens: int, hidden_size: int, itemsize: int, needs_weight: bool = True) -> Passes:
    """The sum is a result, since whatever follows reads it; the residual's gradient an operand."""
    return _rms_norm(1, tokens, hidden_size, itemsize, needs_weight)


def _rms_norm(
    added: int, tokens: int, hidden_size: int, itemsize: int, needs_weight: bool
) -> Passes:
    numel = tokens * hidden_size
    read_and_written = ((2 + 2 * added) * numel + hidden_size) * itemsize
    forward = _memory_bound(read_and_written, (4 + added) * numel, extra=4 * tokens)
    required = ((3 + added) * numel + (1 + needs_weight) * hidden_size) * itemsize
    partial = partial_rows(tokens, hidden_size, itemsize) if needs_weight else 0
    flops = (7 + added + 2 * needs_weight) * numel
    return Passes(forward, _memory_bound(required, flops, 4 * tokens + partial))


def layer_norm(tokens: int, hidden_size: int, itemsize: int) -> Passes:
    numel, partial = tokens * hidden_size, 2 * partial_rows(tokens, hidden_size, itemsize)
    forward = _memory_bound(2 * (numel + hidden_size) * itemsize, 7 * numel)
    return Passes(forward, _memory_bound(3 * (numel + hidden_size) * itemsize, 16 * numel, partial))


# activations


def swiglu(tokens: int, intermediate_size: int, itemsize: int) -> Passes:
    numel = tokens * intermediate_size
    forward = _memory_bound(3 * numel * itemsize, 5 * numel)
    return Passes(forward, _memory_bound(5 * numel * itemsize, 11 * numel))


def quick_gelu(numel: int, itemsize: int) -> Passes:
    forward = _memory_bound(2 * numel * itemsize, 5 * numel)
    return Passes(forward, _memory_bound(3 * numel * itemsize, 10 * numel))


# rows; an index has 8 bytes


def pack_rows(num_packed: int, num_rows: int, columns: int, itemsize: int) -> Passes:
    """Backward: sorted indices and their order are written and read; where rows begin."""
    required = (num_packed + num_rows) * columns * itemsize + 8 * num_packed
    extra = 32 * num_packed + 24 * num_rows
    return Passes(
        _memory_bound(num_packed * (2 * columns * itemsize + 8), 0),
        _memory_bound(required, num_packed * columns, extra),
    )


def unpack_rows(num_packed: int, num_rows: int, columns: int, itemsize: int) -> Passes:
    """Forward: the inverse of the indices, 4 bytes per row, is filled, written and read."""
    required = (num_packed + num_rows) * columns * itemsize + 8 * num_packed
    forward = _memory_bound(required, 0, 8 * num_rows + 4 * num_packed)
    return Passes(forward, pack_rows(num_packed, num_rows, columns, itemsize).forward)


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
