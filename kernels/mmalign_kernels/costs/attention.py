"""Bytes and FLOPs of attention over packed samples.

cu_seqlens is a sequence of Python integers, 0 first and the number of tokens last. Rotation counts
by its bytes only.
"""

from collections.abc import Sequence
from itertools import pairwise

from ..triton.launch import ceil_div
from ..triton.launch_attention import KEY_TILE, QUERY_TILE, block_columns
from .cost import Cost, Passes


def full_attention(
    cu_seqlens: Sequence[int], num_attention_heads: int, head_dim: int, itemsize: int
) -> Passes:
    heads = num_attention_heads, num_attention_heads, head_dim
    return _attention(cu_seqlens, *heads, itemsize, causal=False)


def rotary_attention(
    cu_seqlens: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
) -> Passes:
    """The kernels also rotate keys, write them and read them again.

    In the backward pass they do so anew, and write rotated queries for the keys' gradient.
    """
    tokens, block_d = cu_seqlens[-1], block_columns(head_dim)
    heads, kv_heads = num_attention_heads, num_key_value_heads
    plain = _attention(cu_seqlens, heads, kv_heads, head_dim, itemsize, causal)
    padding = block_d - head_dim  # rotated rows are read with their padding
    rotated_k = kv_heads * (head_dim + block_d + 2 * padding)
    rotated_q = heads * (block_d + padding)
    angles = 4 * tokens
    forward = Cost(angles, 0, tokens * kv_heads * 2 * block_d * itemsize + 2 * angles, 0)
    backward = Cost(angles, 0, tokens * (rotated_k + rotated_q) * itemsize + 3 * angles, 0)
    return Passes(plain.forward + forward, plain.backward + backward)


def attention_pairs(cu_seqlens: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that it sees."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in _lengths(cu_seqlens))


def _attention(
    cu_seqlens: Sequence[int], heads: int, kv_heads: int, head_dim: int, itemsize: int, causal: bool
) -> Passes:
    """The backward pass has five products; the kernels take seven, and read all but `out` twice."""
    tokens, block_d = cu_seqlens[-1], block_columns(head_dim)
    pairs = attention_pairs(cu_seqlens, causal) * heads * head_dim
    by_queries, by_keys = _pairs_in_tiles(cu_seqlens, causal)
    qkvo, logsumexp = tokens * (2 * heads + 2 * kv_heads) * head_dim * itemsize, 4 * heads * tokens
    forward = Cost(qkvo, 4 * pairs, qkvo + logsumexp, 4 * heads * block_d * by_queries)
    required = 2 * qkvo + logsumexp
    done = heads * block_d * (6 * by_queries + 8 * by_keys)
    backward = Cost(required, 10 * pairs, required + qkvo + 4 * logsumexp, done)
    return Passes(forward, backward)


def _pairs_in_tiles(cu_seqlens: Sequence[int], causal: bool) -> tuple[int, int]:
    """Pairs in the tiles of programs that own queries, and that own keys."""
    by_queries = by_keys = 0
    for length in _lengths(cu_seqlens):
        for first in range(0, length, QUERY_TILE):
            end = min(first + QUERY_TILE, length) if causal else length
            by_queries += QUERY_TILE * _up_to_tile(end)
            by_keys += QUERY_TILE * _up_to_tile(length - first if causal else length)
    return by_queries, by_keys


def _up_to_tile(length: int) -> int:
    return ceil_div(length, KEY_TILE) * KEY_TILE


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(cu_seqlens)]
