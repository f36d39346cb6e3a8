"""Attention after a shared prefix in plain PyTorch: one product of all rows with the prefix."""

import torch
from torch import Tensor

from .full_attention import attention, attention_bwd
from .rotary_attention import angles, rotary_attention_bwd, rotary_attention_fwd, rotate


def shared_prefix_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, prefix_keys: Tensor, prefix_values: Tensor, num_attention_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    settings = cos, sin, position_ids, cu_seqlens, max_seqlen, *heads, True
    out, logsumexp = rotary_attention_fwd(qkv, *settings)
    if len(qkv) and len(prefix_keys):
        q = _queries(qkv, cos, sin, position_ids, num_attention_heads, prefix_keys)
        part, part_logsumexp = attention(
            _as_batch(q), _as_batch(prefix_keys), _as_batch(prefix_values)
        )
        part, part_logsumexp = (x[0].transpose(0, 1) for x in (part, part_logsumexp))
        total = torch.logaddexp(logsumexp, part_logsumexp)
        share = (part_logsumexp - total).exp_()[..., None]
        out.view(q.shape).lerp_(part.to(out.dtype), share.to(out.dtype))
        logsumexp = total
    return out, logsumexp


def shared_prefix_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    settings = cos, sin, position_ids, cu_seqlens, max_seqlen, *heads, True
    grad_qkv = rotary_attention_bwd(grad_out, qkv, out, logsumexp, *settings)
    if len(qkv) and len(prefix_keys):
        q = _queries(qkv, cos, sin, position_ids, num_attention_heads, prefix_keys)
        flat = grad_out.reshape(q.shape), q, prefix_keys, prefix_values, out.view(q.shape)
        grad_q, _, _ = attention_bwd(*map(_as_batch, (*flat, logsumexp)), causal=False)
        grad_q = grad_q[0].transpose(0, 1).to(qkv.dtype)  # (total_tokens, heads, head_dim)
        cos, sin = angles(cos, position_ids, qkv), angles(sin, position_ids, qkv)
        rotated_back = torch.empty_like(q)
        rotate(grad_q, cos, -sin, rotated_back)
        grad_qkv[:, : out.shape[1]] += rotated_back.flatten(1)
    return grad_qkv


def _queries(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, keys: Tensor
) -> Tensor:
    """Rotated, (total_tokens, heads, head_dim)."""
    cos, sin = angles(cos, position_ids, qkv), angles(sin, position_ids, qkv)
    q = qkv.unflatten(1, (-1, keys.shape[2]))[:, :num_heads]
    rotated = qkv.new_empty(q.shape)
    rotate(q, cos, sin, rotated)
    return rotated


def _as_batch(x: Tensor) -> Tensor:
    """(rows, heads, ...) -> (1, heads, rows, ...), a view."""
    return x[None].transpose(1, 2)
