"""Prefix attention in Triton: new keys and values into the cache, then attention over spans of it.

First kernel: a program owns BLOCK_M new rows and SHARE key heads, rotates the keys and writes keys
and values at the end of the segment's last span. Second kernel: a program owns BLOCK_M queries of
one segment and one head, rotates them on load, and loops over the keys of the segment's spans with
one softmax; attention_tiles.py assigns the rows of both. In each span a query attends to the keys
below its limit: all of a full span, those up to itself in the last. Key tiles below every limit
need no mask.

Reads the projection once for q and once for k and v, spans (8 bytes each), and per program the keys
and values of its spans, which neighbours of the same head have left in L2. Writes one row of
output, keys and values per token. FLOPs: 4 * heads * head_dim per visible pair.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..operation import check_offsets
from . import launch_attention
from .attention_parts import LOG2_E, load_angles, load_tile, rotate, store_tile
from .attention_tiles import attention_tiles, tile_at
from .common import upcast
from .launch import ceil_div


@triton.jit(do_not_specialize=["num_slots"])
def _cache_rows_kernel(
    keys_ptr,  # (capacity, KV_HEADS, HEAD_DIM), written
    values_ptr,  # (capacity, KV_HEADS, HEAD_DIM), written
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    span_ends_ptr,
    cu_spans_ptr,
    tiles_ptr,
    num_slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARE: tl.constexpr,
):
    segment, row, length, tile = tile_at(tiles_ptr, num_slots, tl.program_id(0))
    if length == 0:
        return
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    CACHE_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    slot = tl.load(span_ends_ptr + tl.load(cu_spans_ptr + segment + 1) - 1).to(tl.int64) - length
    first = tile * BLOCK_M
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr + row, first, length, HALF, BLOCK_M, BLOCK_HALF
    )
    first_head = tl.program_id(1) * SHARE
    for head in range(first_head, tl.minimum(first_head + SHARE, KV_HEADS)):
        from_ptr = qkv_ptr + row * STRIDE + (HEADS + head) * HEAD_DIM
        to_ptr = keys_ptr + slot * CACHE_STRIDE + head * HEAD_DIM
        low = load_tile(from_ptr, first, length, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True)
        high = load_tile(from_ptr + HALF, first, length, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True)
        low, high = rotate(upcast(low), upcast(high), cos, sin)
        store_tile(to_ptr, low, first, length, CACHE_STRIDE, HALF, BLOCK_M, BLOCK_HALF)
        store_tile(to_ptr + HALF, high, first, length, CACHE_STRIDE, HALF, BLOCK_M, BLOCK_HALF)
        from_ptr += KV_HEADS * HEAD_DIM
        v = load_tile(from_ptr, first, length, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        to_ptr = values_ptr + slot * CACHE_STRIDE + head * HEAD_DIM
        store_tile(to_ptr, v, first, length, CACHE_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _rotated_query(
    q_ptr,  # column 0 of the head in the segment's first row
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    first,
    length,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_M, BLOCK_D) with the columns of keys in the cache: adjacent halves, no padding."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row = first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)[None, :]
    is_low = column < HALF
    known = (row < length)[:, None] & (column < HEAD_DIM)
    position = tl.load(position_ids_ptr + row, mask=row < length, other=0).to(tl.int64)
    angle = position[:, None] * HALF + tl.where(is_low, column, column - HALF)
    ptrs = q_ptr + row.to(tl.int64)[:, None] * STRIDE
    partner = tl.load(ptrs + tl.where(is_low, column + HALF, column - HALF), mask=known, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=known, other=0.0)
    rotated = upcast(partner) * tl.where(is_low, -sin, sin)
    own = tl.load(ptrs + column, mask=known, other=0.0)
    rotated += upcast(own) * tl.load(cos_ptr + angle, mask=known, other=0.0)
    return rotated.to(q_ptr.dtype.element_ty)


@triton.jit
def _attend_to(
    acc,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    begin,
    end,
    num_keys,
    limit,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the keys begin to end - 1 of a span; MASKED: only to those below each limit."""
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, num_keys, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            scores = tl.where(key < limit[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)  # in powers of two
        p = tl.exp2(scores * SCALE - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, start, num_keys, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], "ieee", out_dtype=acc.dtype)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_slots"])
def _prefix_attention_kernel(
    out_ptr,  # (total_tokens, HEADS * HEAD_DIM)
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys_ptr,  # (capacity, KV_HEADS, HEAD_DIM)
    values_ptr,  # (capacity, KV_HEADS, HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    span_begins_ptr,
    span_ends_ptr,
    cu_spans_ptr,
    tiles_ptr,
    num_slots,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment, row, length, tile = tile_at(tiles_ptr, num_slots, tl.program_id(0))
    if length == 0:
        return
    head = tl.program_id(1)
    CACHE_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first = tile * BLOCK_M
    q = _rotated_query(
        qkv_ptr + row * STRIDE + head * HEAD_DIM, cos_ptr, sin_ptr, position_ids_ptr + row,
        first, length, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    # by way of its rows of the output, or every step loads q from shared memory (load_query)
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    out_ptr += (row * HEADS + head) * HEAD_DIM
    store_tile(out_ptr, q, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.debug_barrier()
    q = load_tile(out_ptr, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    ACCUMULATOR: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    peak = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
    column = head // (HEADS // KV_HEADS) * HEAD_DIM
    last = tl.load(cu_spans_ptr + segment + 1).to(tl.int32) - 1
    for span in range(tl.load(cu_spans_ptr + segment).to(tl.int32), last + 1):
        begin = tl.load(span_begins_ptr + span).to(tl.int64)
        num_keys = (tl.load(span_ends_ptr + span).to(tl.int64) - begin).to(tl.int32)
        # keys visible to the tile's first query, and how many more to each query after it
        seen, step = num_keys, 0
        if span == last:
            seen, step = num_keys - length + first + 1, 1
        limit = seen + step * tl.arange(0, BLOCK_M)
        k_ptr = keys_ptr + begin * CACHE_STRIDE + column
        v_ptr = values_ptr + begin * CACHE_STRIDE + column
        plain = seen // BLOCK_N * BLOCK_N
        end = tl.minimum(seen + step * (BLOCK_M - 1), num_keys)
        for masked in tl.static_range(2):
            acc, total, peak = _attend_to(
                acc, total, peak, q, k_ptr, v_ptr,
                plain if masked else 0, end if masked else plain, num_keys, limit,
                SCALE, CACHE_STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, masked,
            )  # fmt: skip
    out = acc / total[:, None]
    store_tile(out_ptr, out, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)


def prefix_attention_update(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    span_begins: Tensor,
    span_ends: Tensor,
    cu_spans: Tensor,
    keys: Tensor,
    values: Tensor,
    num_attention_heads: int,
) -> Tensor:
    if cu_seqlens.is_cpu:  # on a GPU the check would synchronise
        check_offsets(cu_seqlens, max_seqlen, len(qkv))
    _, num_kv_heads, head_dim = keys.shape
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    position_ids, span_begins = position_ids.contiguous(), span_begins.contiguous()
    span_ends, cu_spans = span_ends.contiguous(), cu_spans.contiguous()
    out = qkv.new_empty(len(qkv), num_attention_heads * head_dim)
    settings = launch_attention.prefix(qkv, head_dim, len(cu_seqlens) - 1)
    tiles = attention_tiles(cu_seqlens, len(qkv), settings["BLOCK_M"], True)
    if not tiles.numel():
        return out
    shape = dict(HEADS=num_attention_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim)
    num_slots, share = tiles.shape[1], 8
    _cache_rows_kernel[(num_slots, ceil_div(num_kv_heads, share))](
        keys, values, qkv, cos, sin, position_ids, span_ends, cu_spans, tiles, num_slots, **shape,
        BLOCK_M=settings["BLOCK_M"], BLOCK_D=settings["BLOCK_D"], SHARE=share, num_warps=8,
    )  # fmt: skip
    _prefix_attention_kernel[(num_slots, num_attention_heads)](
        out, qkv, keys, values, cos, sin, position_ids, span_begins, span_ends, cu_spans,
        tiles, num_slots, SCALE=LOG2_E * head_dim**-0.5, **shape, **settings,
    )  # fmt: skip
    return out
