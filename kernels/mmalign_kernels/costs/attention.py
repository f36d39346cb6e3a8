"""Bytes and FLOPs of attention over packed samples.

cu_seqlens is a sequence of Python integers, 0 first and the number of tokens last. Rotation counts
by its bytes only.
"""

from collections.abc import Sequence

from ..triton.launch import ceil_div
from ..triton.launch_attention import (
    KEY_TILE,
    PREFIX_QUERY_TILE,
    QUERY_TILE,
    block_columns,
    other_query_tile,
    prefix_key_tile,
)
from .cost import Cost


def rotary_attention_forward(
    cu_seqlens: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
) -> Cost:
    """The kernels also read keys, rotate them, write them and read them again."""
    tokens, block_d = cu_seqlens[-1], block_columns(head_dim)
    heads, kv_heads = num_attention_heads, num_key_value_heads
    plain = _attention_forward(cu_seqlens, heads, kv_heads, head_dim, itemsize, causal)
    rotated = tokens * kv_heads * (block_d + block_d) * itemsize + 2 * 4 * tokens
    angles = 4 * tokens
    required, moved = plain.bytes + angles, plain.moved_bytes + rotated
    return Cost(required, plain.flops, moved, plain.done_flops)


def rotary_attention_backward(
    cu_seqlens: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
) -> Cost:
    """The kernels also rotate keys again, and write rotated queries for the keys' gradient."""
    tokens, block_d = cu_seqlens[-1], block_columns(head_dim)
    heads, kv_heads = num_attention_heads, num_key_value_heads
    plain = _attention_backward(cu_seqlens, heads, kv_heads, head_dim, itemsize, causal)
    padding = block_d - head_dim  # rotated rows are read with their padding
    rotated_k = kv_heads * (head_dim + block_d + 2 * padding)
    rotated_q = heads * (block_d + padding)
    moved = plain.moved_bytes + tokens * ((rotated_k + rotated_q) * itemsize + 3 * 4)
    return Cost(plain.bytes + 4 * tokens, plain.flops, moved, plain.done_flops)


def full_attention_forward(
    cu_seqlens: Sequence[int], num_attention_heads: int, head_dim: int, itemsize: int
) -> Cost:
    heads = num_attention_heads
    return _attention_forward(cu_seqlens, heads, heads, head_dim, itemsize, False)


def full_attention_backward(
    cu_seqlens: Sequence[int], num_attention_heads: int, head_dim: int, itemsize: int
) -> Cost:
    heads = num_attention_heads
    return _attention_backward(cu_seqlens, heads, heads, head_dim, itemsize, False)


def prefix_attention_forward(
    cu_seqlens: Sequence[int],
    span_begins: Sequence[int],
    span_ends: Sequence[int],
    cu_spans: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
) -> Cost:
    """A cache row counts once, however many segments see it; the own rows are read back."""
    tokens, heads, kv_heads = cu_seqlens[-1], num_attention_heads, num_key_value_heads
    visible = set()
    pairs = done = 0
    for i, length in enumerate(_lengths(cu_seqlens)):
        spans = list(zip(span_begins, span_ends, strict=True))[cu_spans[i] : cu_spans[i + 1]]
        visible.update(row for span in spans for row in range(*span))
        *prefixes, last = (end - begin for begin, end in spans)
        pairs += length * (sum(prefixes) + last - length) + length * (length + 1) // 2
        done += _prefix_pairs(length, prefixes, last, prefix_key_tile(head_dim))
    own, row = tokens, 2 * kv_heads * head_dim * itemsize
    required = tokens * 2 * heads * head_dim * itemsize + row * (own + len(visible)) + 4 * tokens
    per_pair, block_d = 4 * heads, block_columns(head_dim)
    moved = required + row * own + 4 * tokens
    return Cost(required, per_pair * head_dim * pairs, moved, per_pair * block_d * done)


def _prefix_pairs(length: int, prefixes: Sequence[int], last: int, key_tile: int) -> int:
    """Pairs in the tiles of programs that own queries of one segment."""
    pairs = 0
    for first in range(0, length, PREFIX_QUERY_TILE):
        seen = min(last - length + first + PREFIX_QUERY_TILE, last)
        tiles = sum(ceil_div(keys, key_tile) for keys in (*prefixes, seen))
        pairs += PREFIX_QUERY_TILE * key_tile * tiles
    return pairs


def attention_pairs(cu_seqlens: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that it sees."""
    lengths = _lengths(cu_seqlens)
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def _attention_forward(
    cu_seqlens: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool,
) -> Cost:
    tokens = cu_seqlens[-1]
    required = tokens * (2 * heads + 2 * kv_heads) * head_dim * itemsize
    pairs, done, _ = _pairs(cu_seqlens, head_dim, causal)
    per_pair = 4 * heads
    return Cost(
        required,
        per_pair * head_dim * pairs,
        required + 4 * heads * tokens,
        per_pair * block_columns(head_dim) * done,
    )


def _attention_backward(
    cu_seqlens: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool,
) -> Cost:
    """Five products; the kernels take seven, and read all but `out` twice."""
    tokens = cu_seqlens[-1]
    required = tokens * ((4 * heads + 4 * kv_heads) * head_dim * itemsize + 4 * heads)
    again = tokens * ((2 * heads + 2 * kv_heads) * head_dim * itemsize + 16 * heads)
    pairs, by_queries, by_keys = _pairs(cu_seqlens, head_dim, causal)
    done = heads * block_columns(head_dim) * (6 * by_queries + 8 * by_keys)
    return Cost(required, 10 * heads * head_dim * pairs, required + again, done)


def _pairs(cu_seqlens: Sequence[int], head_dim: int, causal: bool) -> tuple[int, int, int]:
    """Pairs that count, and those in the tiles of programs that own queries, and keys."""
    by_queries, by_keys, query_tile = 0, 0, other_query_tile(head_dim)
    for length in _lengths(cu_seqlens):
        for first in range(0, length, QUERY_TILE):
            end = min(first + QUERY_TILE, length) if causal else length
            by_queries += QUERY_TILE * _up_to(end, KEY_TILE)
            by_keys += QUERY_TILE * _up_to(length - first if causal else length, query_tile)
    return attention_pairs(cu_seqlens, causal), by_queries, by_keys


def _up_to(length: int, tile: int) -> int:
    return ceil_div(length, tile) * tile


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
