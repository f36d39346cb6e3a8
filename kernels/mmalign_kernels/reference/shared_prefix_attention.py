"""Attention after a shared prefix in plain PyTorch: one product of all rows with the prefix.

backend: a module whose rotary_attention_fwd and _bwd compute attention to a sample's own keys.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import rotary_attention
from .full_attention import attention, attention_bwd
from .rotary_attention import angles, rotate


def shared_prefix_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, prefix_keys: Tensor, prefix_values: Tensor, num_attention_heads: int,
    backend: ModuleType = rotary_attention,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    tables = cos, sin, position_ids
    own = backend.rotary_attention_fwd(qkv, *tables, cu_seqlens, max_seqlen, *heads, True)
    out, logsumexp = own
    return _add_prefix(out, logsumexp, qkv, *tables, prefix_keys, prefix_values)


def shared_prefix_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
    max_seqlen: int, num_attention_heads: int, backend: ModuleType = rotary_attention,
) -> Tensor:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    saved, tables = (grad_out, qkv, out, logsumexp), (cos, sin, position_ids)
    grad_qkv = backend.rotary_attention_bwd(*saved, *tables, cu_seqlens, max_seqlen, *heads, True)
    return _add_prefix_gradient(grad_qkv, *saved, *tables, prefix_keys, prefix_values)


def _add_prefix(
    out: Tensor, logsumexp: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
    prefix_keys: Tensor, prefix_values: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (overwritten) and logsumexp over own keys and prefix, from those of the own keys."""
    if not len(qkv) or not len(prefix_keys):
        return out, logsumexp
    q = _queries(qkv, cos, sin, position_ids, logsumexp.shape[1], prefix_keys)
    part, part_logsumexp = attention(_as_batch(q), _as_batch(prefix_keys), _as_batch(prefix_values))
    part, part_logsumexp = (x[0].transpose(0, 1) for x in (part, part_logsumexp))
    total = torch.logaddexp(logsumexp, part_logsumexp)
    share = (part_logsumexp - total).exp_()[..., None]
    out.view(q.shape).lerp_(part.to(out.dtype), share.to(out.dtype))
    return out, total


def _add_prefix_gradient(
    grad_qkv: Tensor, grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor,
    sin: Tensor, position_ids: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
) -> Tensor:  # fmt: skip
    """grad_qkv, with the prefix's part of the queries' gradient added."""
    if not len(qkv) or not len(prefix_keys):
        return grad_qkv
    q = _queries(qkv, cos, sin, position_ids, logsumexp.shape[1], prefix_keys)
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
