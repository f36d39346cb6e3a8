"""Bytes and FLOPs of attention over packed samples (see costs.py).

cu_seqlens is a sequence of Python integers, 0 first and the number of tokens last. Rotation counts
by its bytes only.
"""

from collections.abc import Sequence

from .cost import Cost, ceil_div, next_power_of_2

QUERY_TILE, KEY_TILE = 128, 64  # on sm_90; keys by queries where a program owns keys
PREFIX_QUERY_TILE = 64


def rotary_attention_forward(
    cu_seqlens: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
) -> Cost:
    """Rotation counts as bytes only. Beside the floor: keys are read, turned, written, and read."""
    tokens, block_d = cu_seqlens[-1], _block_columns(head_dim)
    heads, kv_heads = num_attention_heads, num_key_value_heads
    plain = _attention_forward(cu_seqlens, heads, kv_heads, head_dim, itemsize, causal)
    turned = tokens * kv_heads * (block_d + block_d) * itemsize + 2 * 4 * tokens
    angles = 4 * tokens
    floor, moved = plain.bytes + angles, plain.moved_bytes + turned
    return Cost(floor, plain.flops, moved, plain.done_flops)


def rotary_attention_backward(
    cu_seqlens: Sequence[int],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    itemsize: int,
    causal: bool = True,
) -> Cost:
    """Beside: keys are turned again, and turned queries are left for the keys' gradient."""
    tokens, block_d = cu_seqlens[-1], _block_columns(head_dim)
    heads, kv_heads = num_attention_heads, num_key_value_heads
    plain = _attention_backward(cu_seqlens, heads, kv_heads, head_dim, itemsize, causal)
    padding = block_d - head_dim  # turned rows are read as wide as they lie
    turned_k = kv_heads * (head_dim + block_d + 2 * padding)
    turned_q = heads * (block_d + padding)
    moved = plain.moved_bytes + tokens * ((turned_k + turned_q) * itemsize + 3 * 4)
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
    floor = tokens * 2 * heads * head_dim * itemsize + row * (own + len(visible)) + 4 * tokens
    per_pair, block_d = 4 * heads, _block_columns(head_dim)
    moved = floor + row * own + 4 * tokens
    return Cost(floor, per_pair * head_dim * pairs, moved, per_pair * block_d * done)


def prefix_key_tile(head_dim: int) -> int:
    return 32 if _block_columns(head_dim) == head_dim else 64


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
    floor = tokens * (2 * heads + 2 * kv_heads) * head_dim * itemsize
    pairs, done, _ = _pairs(cu_seqlens, causal)
    per_pair = 4 * heads
    return Cost(
        floor,
        per_pair * head_dim * pairs,
        floor + 4 * heads * tokens,
        per_pair * _block_columns(head_dim) * done,
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
    floor = tokens * ((4 * heads + 4 * kv_heads) * head_dim * itemsize + 4 * heads)
    again = tokens * ((2 * heads + 2 * kv_heads) * head_dim * itemsize + 16 * heads)
    pairs, by_queries, by_keys = _pairs(cu_seqlens, causal)
    done = heads * _block_columns(head_dim) * (6 * by_queries + 8 * by_keys)
    return Cost(floor, 10 * heads * head_dim * pairs, floor + again, done)


def _pairs(cu_seqlens: Sequence[int], causal: bool) -> tuple[int, int, int]:
    """Pairs that count, and those in the tiles of programs that own queries, and keys."""
    by_queries = by_keys = 0
    for length in _lengths(cu_seqlens):
        for first in range(0, length, QUERY_TILE):
            end = min(first + QUERY_TILE, length) if causal else length
            by_queries += QUERY_TILE * _up_to_tile(end)
            by_keys += QUERY_TILE * _up_to_tile(length - first if causal else length)
    return attention_pairs(cu_seqlens, causal), by_queries, by_keys


def _up_to_tile(length: int) -> int:
    return ceil_div(length, KEY_TILE) * KEY_TILE


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def _block_columns(head_dim: int) -> int:
    return max(next_power_of_2(head_dim), 16)
