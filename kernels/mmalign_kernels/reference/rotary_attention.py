"""Rotary attention in plain PyTorch: rotation, then the attention of full_attention.py."""

import torch
from torch import Tensor

from ..operation import compute_dtype
from .full_attention import attend, attend_bwd


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x (rows, heads, head_dim) by cos, sin (rows, 1, 1, head_dim / 2) into out."""
    x = x.to(cos.dtype).unflatten(-1, (2, -1))
    upcast = out.unflatten(-1, (2, -1)) if out.dtype == cos.dtype else torch.empty_like(x)
    torch.mul(x, cos, out=upcast)
    upcast[:, :, 0].addcmul_(x[:, :, 1], sin[:, 0], value=-1)
    upcast[:, :, 1].addcmul_(x[:, :, 0], sin[:, 0])
    if out.dtype != cos.dtype:
        out.copy_(upcast.flatten(-2))


def angles(table: Tensor, position_ids: Tensor, like: Tensor) -> Tensor:
    return table.index_select(0, position_ids).to(compute_dtype(like))[:, None, None]


def _rotated_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_attention_heads: int, num_key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, v as it is: (total_tokens, heads, head_dim)."""
    heads = qkv.unflatten(1, (num_attention_heads + 2 * num_key_value_heads, -1))
    unrotated, v = heads[:, :-num_key_value_heads], heads[:, -num_key_value_heads:]
    rotated = qkv.new_empty(unrotated.shape)
    rotate(unrotated, cos, sin, rotated)
    return rotated[:, :num_attention_heads], rotated[:, num_attention_heads:], v


def rotary_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int, num_key_value_heads: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cos, sin = angles(cos, position_ids, qkv), angles(sin, position_ids, qkv)
    qkv = qkv.contiguous()
    q, k, v = _rotated_heads(qkv, cos, sin, num_attention_heads, num_key_value_heads)
    return attend(q, k, v, cu_seqlens, max_seqlen, causal)


def rotary_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int,
    num_key_value_heads: int, causal: bool,
) -> Tensor:  # fmt: skip
    cos, sin = angles(cos, position_ids, qkv), angles(sin, position_ids, qkv)
    qkv = qkv.contiguous()
    q, k, v = _rotated_heads(qkv, cos, sin, num_attention_heads, num_key_value_heads)
    parts = (q, k, v, out.view(q.shape), logsumexp)
    grad_qkv = qkv.new_empty(qkv.shape)
    sizes = (num_attention_heads, num_key_value_heads, num_key_value_heads)
    heads = grad_qkv.unflatten(1, (sum(sizes), -1)).split(sizes, 1)
    for rows, grads in attend_bwd(grad_out, parts, cu_seqlens, max_seqlen, causal):
        for part in (0, 1):
            rotate(grads[part], cos[rows], -sin[rows], heads[part][rows])
        heads[2][rows] = grads[2]
    return grad_qkv
