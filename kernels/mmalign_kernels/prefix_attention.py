"""Prefix attention: rotary attention of segments that share prefixes, over a KV cache.

Plain PyTorch: reference/prefix_attention.py. Packed segments (branches of a tree, or the new tokens
of samples) attend to a cache, which holds the rows of this call and of earlier ones. Each segment
has a list of spans of cache rows: all its tokens attend to every row of all spans but the last; the
last span ends with the segment's own rows and is causal, aligned at its end, as in flash attention
with a KV cache. So a prefix is computed once, and any number of branches and later calls read it.

Rotation as in rotary_attention.py. The operation also writes the new rotated keys and the values
into the cache, at the end of each segment's last span. Forward only: scoring and generation.
"""

import torch
from torch import Tensor

from .operation import check_floats, check_integers, check_rank, check_shape, mutating


@mutating("keys", "values")
def prefix_attention_update(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, span_begins: Tensor, span_ends: Tensor, cu_spans: Tensor, keys: Tensor,
    values: Tensor, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], num_attention_heads * keys.shape[2]))


@torch.no_grad()
def prefix_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, span_begins: Tensor, span_ends: Tensor, cu_spans: Tensor, keys: Tensor,
    values: Tensor, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v over each segment's spans of the cache, without a gradient.

    qkv (total_tokens, (heads + 2 * key_value_heads) * head_dim): q, then k, then v, unrotated; cos
    and sin (max_positions, head_dim / 2) fp32; position_ids (total_tokens,) along each token's
    path; cu_seqlens (num_segments + 1,) from 0 to total_tokens, on the CPU, as the spans are;
    max_seqlen at least the longest segment. Segment i attends to the cache rows span_begins[j] to
    span_ends[j] - 1 for j from cu_spans[i] to cu_spans[i + 1] - 1: at least one span, without
    overlap; the last one is at least as long as the segment and ends with its own rows, which no
    other segment of the call owns. keys and values (capacity, key_value_heads, head_dim), keys
    rotated: the own rows are written, all others are read -> (total_tokens, heads * head_dim).
    Raises ValueError if shapes, dtypes or devices do not match, or spans do not fit the segments
    and the cache.
    """
    name = "prefix_attention"
    check_rank(name, 2, qkv=qkv, cos=cos)
    check_rank(name, 3, keys=keys)
    check_floats(name, qkv=qkv, keys=keys, values=values)
    check_floats(name, cos=cos, sin=sin)
    check_integers(name, qkv, position_ids=position_ids)
    spans = dict(span_begins=span_begins, span_ends=span_ends, cu_spans=cu_spans)
    check_integers(name, torch.empty(0, device="cpu"), cu_seqlens=cu_seqlens, **spans)
    capacity, num_key_value_heads, head_dim = keys.shape
    context = f"keys {tuple(keys.shape)} and {num_attention_heads} heads"
    columns = (num_attention_heads + 2 * num_key_value_heads) * head_dim
    check_shape(name, (qkv.shape[0], columns), context, qkv=qkv)
    check_shape(name, (capacity, num_key_value_heads, head_dim), context, values=values)
    check_shape(name, (cos.shape[0], head_dim // 2), context, cos=cos, sin=sin)
    check_shape(name, qkv.shape[:1], f"qkv {tuple(qkv.shape)}", position_ids=position_ids)
    check_shape(name, cu_seqlens.shape, "cu_seqlens", cu_spans=cu_spans)
    check_shape(name, span_begins.shape, "span_begins", span_ends=span_ends)
    if head_dim % 2 or num_attention_heads % num_key_value_heads:
        raise ValueError(
            f"{name}: {num_attention_heads} heads of {head_dim} columns do not share "
            f"{num_key_value_heads} key heads of an even head_dim"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{name}: keys and values must be contiguous, they are written in place")
    return prefix_attention_update(
        qkv, cos, sin, position_ids, cu_seqlens, max_seqlen,
        span_begins, span_ends, cu_spans, keys, values, num_attention_heads,
    )  # fmt: skip
