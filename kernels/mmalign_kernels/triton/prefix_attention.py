"""Prefix attention in Triton: new keys and values into the cache, then attention to its rows.

First kernel: a program owns BLOCK_M new rows and SHARE key heads, rotates the keys and writes keys
and values to their rows of the cache. Second kernel: a program owns a tile of up to BLOCK_M queries
and one head, rotates them on load, and loops over the keys of the tile with one softmax:
prefix_tiles.py lists them, so the loop gathers full blocks of keys wherever they lie. Key i of the
list is seen by the rows from i - num_path on (all, if it is on the path) to where its list ends.
Blocks that all rows see need no mask.

Reads the projection once for q and once for k and v, 8 bytes per listed key and head, and the keys
and values of each tile, which neighbours of the same head have left in L2. Writes one row of
output, keys and values per token. FLOPs: 4 * heads * head_dim per pair of a row and a listed key.
"""

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from ..operation import check_offsets
from . import launch_attention
from .attention_parts import LOG2_E, load_angles, load_tile, rotate, store_tile
from .common import upcast
from .launch import ceil_div
from .prefix_tiles import prefix_tiles


@triton.jit(do_not_specialize=["num_tokens"])
def _cache_rows_kernel(
    keys_ptr,  # (capacity, KV_HEADS, HEAD_DIM), written
    values_ptr,  # (capacity, KV_HEADS, HEAD_DIM), written
    qkv_ptr,  # (num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    slots_ptr,  # (num_tokens,) cache rows
    num_tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHARE: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first = tl.program_id(0) * BLOCK_M
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, first, num_tokens, HALF, BLOCK_M, BLOCK_HALF
    )
    row = first + tl.arange(0, BLOCK_M)
    known = (row < num_tokens)[:, None]
    slot = tl.load(slots_ptr + row, mask=row < num_tokens, other=0).to(tl.int64)
    half, column = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_D)[None, :]
    to = slot[:, None] * (KV_HEADS * HEAD_DIM)
    first_head = tl.program_id(1) * SHARE
    for head in range(first_head, tl.minimum(first_head + SHARE, KV_HEADS)):
        from_ptr = qkv_ptr + (HEADS + head) * HEAD_DIM
        to_ptrs = keys_ptr + head * HEAD_DIM + to + half
        low = load_tile(from_ptr, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True)
        high = load_tile(
            from_ptr + HALF, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True
        )
        low, high = rotate(upcast(low), upcast(high), cos, sin)
        tl.store(to_ptrs, low.to(keys_ptr.dtype.element_ty), known & (half < HALF))
        tl.store(to_ptrs + HALF, high.to(keys_ptr.dtype.element_ty), known & (half < HALF))
        from_ptr += KV_HEADS * HEAD_DIM
        v = load_tile(from_ptr, first, num_tokens, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        tl.store(values_ptr + head * HEAD_DIM + to + column, v, known & (column < HEAD_DIM))


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
def _load_keys(
    ptr,  # column 0 of the head in the cache's first row
    slot,
    is_listed,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK_N, BLOCK_D) of the rows `slot` of the cache; 0 where not listed and past HEAD_DIM."""
    column = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + slot.to(tl.int64)[:, None] * STRIDE + column
    if MASKED:
        return tl.load(ptrs, mask=is_listed[:, None] & (column < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(slot >= 0)[:, None] & (column < HEAD_DIM), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _attend_to(
    acc,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    listed_ptr,
    num_listed,
    begin,
    end,
    row,
    num_path,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to the tile's keys begin to end - 1; MASKED: each row to those that it sees."""
    for start in range(begin, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        is_listed = index < end
        if MASKED:
            slot = tl.load(listed_ptr + index, mask=is_listed, other=0)
        else:
            slot = tl.load(listed_ptr + index)
        k = _load_keys(k_ptr, slot, is_listed, STRIDE, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            until = tl.load(listed_ptr + num_listed + index, mask=is_listed, other=0)[None, :]
            seen = (row < until) & (row >= (index - num_path)[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)  # in powers of two
        p = tl.exp2(scores * SCALE - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        v = _load_keys(v_ptr, slot, is_listed, STRIDE, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], "ieee", out_dtype=acc.dtype)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_tiles", "num_listed"])
def _prefix_attention_kernel(
    out_ptr,  # (total_tokens, HEADS * HEAD_DIM)
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys_ptr,  # (capacity, KV_HEADS, HEAD_DIM)
    values_ptr,  # (capacity, KV_HEADS, HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    tiles_ptr,  # PrefixTiles.tiles
    listed_ptr,  # PrefixTiles.keys
    num_tiles,
    num_listed,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_ptr += tl.program_id(0)
    row = tl.load(tiles_ptr).to(tl.int64)
    length = tl.load(tiles_ptr + num_tiles)
    head = tl.program_id(1)
    CACHE_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    q = _rotated_query(
        qkv_ptr + row * STRIDE + head * HEAD_DIM, cos_ptr, sin_ptr, position_ids_ptr + row,
        0, length, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    # by way of its rows of the output, or every step loads q from shared memory (load_query)
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    out_ptr += (row * HEADS + head) * HEAD_DIM
    store_tile(out_ptr, q, 0, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.debug_barrier()
    q = load_tile(out_ptr, 0, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    ACCUMULATOR: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    peak = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
    column = head // (HEADS // KV_HEADS) * HEAD_DIM
    listed_ptr += tl.load(tiles_ptr + 2 * num_tiles)
    num_path = tl.load(tiles_ptr + 3 * num_tiles)
    plain = tl.load(tiles_ptr + 4 * num_tiles) // BLOCK_N * BLOCK_N
    spare_is_last = tl.minimum(tl.arange(0, BLOCK_M), length - 1)[:, None]  # or it sees nothing
    for masked in tl.static_range(2):
        acc, total, peak = _attend_to(
            acc, total, peak, q, keys_ptr + column, values_ptr + column, listed_ptr, num_listed,
            plain if masked else 0, num_path + length if masked else plain, spare_is_last, num_path,
            SCALE, CACHE_STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, masked,
        )  # fmt: skip
    out = acc / total[:, None]
    store_tile(out_ptr, out, 0, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)


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
    check_offsets(cu_seqlens, max_seqlen, len(qkv))
    capacity, num_kv_heads, head_dim = keys.shape
    out = qkv.new_empty(len(qkv), num_attention_heads * head_dim)
    if not len(qkv):
        return out
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    position_ids = position_ids.contiguous()
    few, many = launch_attention.prefix(qkv, head_dim)
    numbers = (x.numpy().astype(np.int64) for x in (cu_seqlens, span_begins, span_ends, cu_spans))
    blocks = few["BLOCK_M"], many["BLOCK_M"]
    plan = prefix_tiles(tuple(x.tobytes() for x in numbers), capacity, blocks, qkv.device)
    shape = dict(HEADS=num_attention_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim)
    rows, share = many["BLOCK_M"], 8
    _cache_rows_kernel[(ceil_div(len(qkv), rows), ceil_div(num_kv_heads, share))](
        keys, values, qkv, cos, sin, position_ids, plan.slots, len(qkv), **shape,
        BLOCK_M=rows, BLOCK_D=many["BLOCK_D"], SHARE=share, num_warps=8,
    )  # fmt: skip
    num_tiles, num_listed = plan.tiles.shape[1], plan.keys.shape[1]
    _prefix_attention_kernel[(num_tiles, num_attention_heads)](
        out, qkv, keys, values, cos, sin, position_ids, plan.tiles, plan.keys,
        num_tiles, num_listed, SCALE=LOG2_E * head_dim**-0.5, **shape,
        **(many if plan.block == many["BLOCK_M"] else few),
    )  # fmt: skip
    return out
