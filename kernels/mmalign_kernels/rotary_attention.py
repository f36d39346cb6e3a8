"""Rotary attention: rotary position embedding and attention within each packed sample.

Su et al. 2021 (arXiv 2104.09864) in the half-split order of Hugging Face's rotate_half: columns i
and i + head_dim / 2 of a head are rotated together. Plain PyTorch: reference/rotary_attention.py.
Reads the flat projection and saves it with the output and the logsumexp; the backward pass rotates
q and k again and writes one gradient of the projection.
"""

from typing import Any

from torch import Tensor

from .operation import (
    check_floats,
    check_integers,
    check_rank,
    check_shape,
    differentiable,
    empty_statistics,
    operation,
)


def _head_dim(qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> int:
    return qkv.shape[1] // (num_attention_heads + 2 * num_key_value_heads)


@operation
def rotary_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int, num_key_value_heads: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and logsumexp (total_tokens, num_attention_heads)."""
    head_dim = _head_dim(qkv, num_attention_heads, num_key_value_heads)
    out = qkv.new_empty((qkv.shape[0], num_attention_heads * head_dim))
    return out, empty_statistics(qkv, num_attention_heads)


@operation
def rotary_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int,
    num_key_value_heads: int, causal: bool,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cos, sin, position_ids, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(qkv, *output, cos, sin, position_ids, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd writes zeros for logsumexp


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple:
    if grad_out is None:
        return (None,) * 9
    return rotary_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.settings), *(None,) * 8


_rotary_attention = differentiable(rotary_attention_fwd, _save, _backward)


def rotary_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int, num_key_value_heads: int, causal: bool = True,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v in each sample, with q and k rotated by their positions.

    qkv (total_tokens, (heads + 2 * key_value_heads) * head_dim): q, then k, then v; cos and sin
    (max_positions, head_dim / 2) fp32; position_ids (total_tokens,); cu_seqlens (num_samples + 1,)
    integers from 0 to total_tokens; max_seqlen at least the longest sample; causal: a token attends
    to itself and to earlier ones -> (total_tokens, heads * head_dim). Grouped queries: key head j
    serves query heads j * group to (j + 1) * group - 1, group = heads / key_value_heads. Raises
    ValueError if shapes, dtypes or devices do not match.
    """
    name = "rotary_attention"
    check_rank(name, 2, qkv=qkv, cos=cos)
    check_floats(name, qkv=qkv)
    check_floats(name, cos=cos, sin=sin)
    check_integers(name, qkv, position_ids=position_ids, cu_seqlens=cu_seqlens)
    head_dim = _head_dim(qkv, num_attention_heads, num_key_value_heads)
    num_heads = num_attention_heads + 2 * num_key_value_heads
    if num_heads * head_dim != qkv.shape[1] or head_dim % 2:
        raise ValueError(
            f"{name}: the columns of qkv {tuple(qkv.shape)} are not {num_attention_heads} + 2 * "
            f"{num_key_value_heads} heads of an even head_dim"
        )
    if num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"{name}: {num_attention_heads} heads are not a multiple of {num_key_value_heads} "
            "key heads"
        )
    context = f"qkv {tuple(qkv.shape)} and cos {tuple(cos.shape)}"
    check_shape(name, (cos.shape[0], head_dim // 2), context, cos=cos, sin=sin)
    check_shape(name, qkv.shape[:1], context, position_ids=position_ids)
    settings = max_seqlen, num_attention_heads, num_key_value_heads, causal
    return _rotary_attention(qkv, cos, sin, position_ids, cu_seqlens, *settings)[0]
