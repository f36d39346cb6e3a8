"""Attention in plain PyTorch: one fused call per run of samples of equal length, no padding."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..operation import check_offsets, compute_dtype

aten = torch.ops.aten


def _runs(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Iterator[tuple[slice, int]]:
    """Rows of consecutive samples of equal length, and the number of samples."""
    bounds, lengths = check_offsets(cu_seqlens, max_seqlen, num_tokens)
    first = 0
    for i, length in enumerate(lengths):
        if i + 1 == len(lengths) or lengths[i + 1] != length:
            if length:
                yield slice(bounds[first], bounds[i + 1]), i + 1 - first
            first = i + 1


def _by_sample(x: Tensor, rows: slice, count: int) -> Tensor:
    """(total_tokens, heads, ...) -> (count, heads, length, ...), a view."""
    return x[rows].unflatten(0, (count, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(count, heads, length, ...) -> (count * length, heads, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of (count, heads, length, head_dim)."""
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask
        )
    return eager_attention(q, k, v, causal, mask)


def attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, logsumexp, 0.0, causal
        )
    return eager_attention_bwd(grad, q, k, v, out, logsumexp, causal)


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        length = q.shape[-2]
        above = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(above, -torch.inf)
    return scores


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """attention on any device, with all scores in memory."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    scores = _scores(q, k.repeat_interleave(group, 1), causal)
    scores = scores if mask is None else scores + mask
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp() @ v.repeat_interleave(group, 1), logsumexp


def eager_attention_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    grad, q, k, v, out = (x.to(compute_dtype(x)) for x in (grad, q, k, v, out))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    probs = (_scores(q, k, causal) - logsumexp[..., None]).exp()
    grad_scores = grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
    grad_scores.mul_(probs).mul_(q.shape[-1] ** -0.5)
    grad_k, grad_v = grad_scores.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ grad
    grad_k, grad_v = (x.unflatten(1, (-1, group)).sum(2) for x in (grad_k, grad_v))
    return grad_scores @ k, grad_k, grad_v


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """q, k, v (total_tokens, heads, head_dim) -> flat output, logsumexp (total_tokens, heads)."""
    outs, logsumexps = [q.new_empty(0, *q.shape[1:])], [q.new_empty(0, q.shape[1])]
    for rows, count in _runs(cu_seqlens, max_seqlen, len(q)):
        q_rows, k_rows, v_rows = (_by_sample(x, rows, count) for x in (q, k, v))
        out, logsumexp = attention(q_rows, k_rows, v_rows, causal)
        outs.append(_flat(out).to(q.dtype))
        logsumexps.append(_flat(logsumexp))
    if len(outs) == 2:  # all samples have one length
        return outs[1].flatten(1), logsumexps[1].contiguous()
    return torch.cat(outs).flatten(1), torch.cat(logsumexps)


def attend_bwd(
    grad_out: Tensor, parts: tuple[Tensor, ...], cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """parts: q, k, v, out, logsumexp -> rows and their gradients of q, k, v (rows, heads, dim)."""
    grad_out = grad_out.reshape(parts[3].shape)
    for rows, count in _runs(cu_seqlens, max_seqlen, len(grad_out)):
        grads = attention_bwd(
            *(_by_sample(x, rows, count) for x in (grad_out, *parts)), causal=causal
        )
        yield rows, tuple(_flat(x) for x in grads)


def full_attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.contiguous().unflatten(1, (3, num_attention_heads, -1)).unbind(1)
    return attend(q, k, v, cu_seqlens, max_seqlen, causal=False)


def full_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    parts = qkv.contiguous().unflatten(1, (3, num_attention_heads, -1)).unbind(1)
    parts = (*parts, out.view(parts[0].shape), logsumexp)
    grad_qkv = qkv.new_empty(qkv.shape)
    heads = grad_qkv.unflatten(1, (3, num_attention_heads, -1)).unbind(1)
    for rows, grads in attend_bwd(grad_out, parts, cu_seqlens, max_seqlen, causal=False):
        for part in range(3):
            heads[part][rows] = grads[part]
    return grad_qkv
