"""Attention within each packed sample, without rotation or causal mask: the CLIP tower.

softmax(q k^T / sqrt(head_dim)) v; cu_seqlens delimits the samples. Plain PyTorch:
reference/full_attention.py. Saved for the backward pass: the input, the output and the logsumexp.
"""

from typing import Any

from torch import Tensor

from .operation import (
    check_floats,
    check_integers,
    check_rank,
    differentiable,
    empty_statistics,
    operation,
)


@operation
def full_attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp (total_tokens, num_attention_heads)."""
    out = qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))
    return out, empty_statistics(qkv, num_attention_heads)


@operation
def full_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.num_attention_heads = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd writes zeros for logsumexp


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple:
    if grad_out is None:
        return (None,) * 4
    grad = full_attention_bwd(grad_out, *ctx.saved_tensors, ctx.max_seqlen, ctx.num_attention_heads)
    return grad, None, None, None


_full_attention = differentiable(full_attention_fwd, _save, _backward)


def full_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> Tensor:
    """Every token attends to all tokens of its sample.

    qkv (total_tokens, 3 * hidden_size): q, then k, then v, each heads by head_dim; cu_seqlens
    (num_samples + 1,) integers from 0 to total_tokens; max_seqlen at least the longest sample
    -> (total_tokens, hidden_size). Raises ValueError if shapes do not match.
    """
    check_rank("full_attention", 2, qkv=qkv)
    check_floats("full_attention", qkv=qkv)
    check_integers("full_attention", qkv, cu_seqlens=cu_seqlens)
    if qkv.shape[1] % (3 * num_attention_heads):
        raise ValueError(
            f"full_attention: the columns of qkv {tuple(qkv.shape)} are not three times "
            f"{num_attention_heads} heads"
        )
    return _full_attention(qkv, cu_seqlens, max_seqlen, num_attention_heads)[0]
