"""Rotary attention of samples that all follow one constant prefix, differentiable in their rows.

Plain PyTorch: reference/shared_prefix_attention.py. The keys and values of the prefix come from
frozen weights and tokens and are computed once; no sample runs the prefix itself, forward or
backward. One softmax over prefix and sample:

    out = share * attention(own keys) + (1 - share) * attention(prefix keys)

with the shares from both logsumexps. So any backend of rotary attention serves the own keys, and
the prefix is merged into its output. In the backward pass, with the merged output and logsumexp,
rotary attention's backward pass gives the exact gradients of the own keys and values and the own
keys' part of the queries' gradient; the prefix adds its part.
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


@operation
def shared_prefix_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, prefix_keys: Tensor, prefix_values: Tensor, num_attention_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and logsumexp (total_tokens, num_attention_heads), over prefix and sample."""
    out = qkv.new_empty((qkv.shape[0], num_attention_heads * prefix_keys.shape[2]))
    return out, empty_statistics(qkv, num_attention_heads)


@operation
def shared_prefix_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, keys, values, num_heads = inputs
    ctx.settings = max_seqlen, num_heads
    ctx.save_for_backward(qkv, *output, cos, sin, position_ids, cu_seqlens, keys, values)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd writes zeros for logsumexp


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple:
    if grad_out is None:
        return (None,) * 9
    grad = shared_prefix_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.settings)
    return grad, *(None,) * 8


_shared_prefix_attention = differentiable(shared_prefix_attention_fwd, _save, _backward)


def shared_prefix_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, prefix_keys: Tensor, prefix_values: Tensor, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    """rotary_attention, causal, where every token also attends to the whole prefix.

    qkv, cos, sin, position_ids, cu_seqlens and max_seqlen as in rotary_attention, of the tokens
    after the prefix; prefix_keys (rotated) and prefix_values (prefix_length, key_value_heads,
    head_dim), which get no gradient -> (total_tokens, heads * head_dim). Raises ValueError where
    shapes, types or devices do not fit, and for a prefix that requires a gradient.
    """
    name = "shared_prefix_attention"
    check_rank(name, 2, qkv=qkv, cos=cos)
    check_rank(name, 3, prefix_keys=prefix_keys)
    check_floats(name, qkv=qkv, prefix_keys=prefix_keys, prefix_values=prefix_values)
    check_floats(name, cos=cos, sin=sin)
    check_integers(name, qkv, position_ids=position_ids, cu_seqlens=cu_seqlens)
    _, num_key_value_heads, head_dim = prefix_keys.shape
    context = f"prefix_keys {tuple(prefix_keys.shape)} and {num_attention_heads} heads"
    columns = (num_attention_heads + 2 * num_key_value_heads) * head_dim
    check_shape(name, (qkv.shape[0], columns), context, qkv=qkv)
    check_shape(name, prefix_keys.shape, context, prefix_values=prefix_values)
    check_shape(name, (cos.shape[0], head_dim // 2), context, cos=cos, sin=sin)
    check_shape(name, qkv.shape[:1], f"qkv {tuple(qkv.shape)}", position_ids=position_ids)
    if head_dim % 2 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"{name}: {num_attention_heads} heads of {head_dim} columns do not share "
            f"{num_key_value_heads} key heads of an even head_dim"
        )
    if prefix_keys.requires_grad or prefix_values.requires_grad:
        raise ValueError(f"{name}: the prefix is constant, it cannot require a gradient")
    prefix = prefix_keys, prefix_values
    return _shared_prefix_attention(
        qkv, cos, sin, position_ids, cu_seqlens, max_seqlen, *prefix, num_attention_heads
    )[0]
