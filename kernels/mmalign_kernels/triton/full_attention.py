"""Flash attention over packed samples in Triton: softmax(q k^T / sqrt(head_dim)) v, forward.

Dao 2023 (arXiv 2307.08691). A program owns BLOCK_M queries of one head and loops over the keys of
its sample with a running maximum and sum of the softmax; attention_tiles.py assigns the queries.
Programs of one head are neighbours, so the head's keys and values stay in L2 (8 MiB at 16,384
tokens of 128 columns) and q, k and v are read from memory about once: with 32 such heads in bf16 a
token reads 24 KiB and writes 8 KiB and 128 bytes of logsumexp. First the keys visible to all
queries of a tile, without a mask, then the others. FLOPs: 4 * heads * head_dim per visible pair.

Products of bf16 and fp16 accumulate in fp32; p is rounded to the dtype of v for the second. The
backward pass is in attention_backward.py, rotation in rotary_attention.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..operation import check_offsets, empty_statistics
from . import launch_attention
from .attention_backward import attend_bwd
from .attention_parts import LN_2, LOG2_E, Rotation, load_query, load_tile, store_tile
from .attention_tiles import attention_tiles, tile_at

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def _attend_to(
    acc,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    first_query,
    begin,
    end,
    length,
    SCALE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take in the keys begin..end; MASKED where some of them are hidden from some queries."""
    query = first_query + tl.arange(0, BLOCK_M)[:, None]
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, length, K_STRIDE, K_COLUMNS, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            visible = key <= query if CAUSAL else (key < length) & (query >= 0)
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * SCALE)  # in powers of two
        p = tl.exp2(scores * SCALE - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, start, length, V_STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], "ieee", out_dtype=acc.dtype)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_slots"])
def _attention_fwd_kernel(
    out_ptr,  # (total_tokens, HEADS * HEAD_DIM)
    logsumexp_ptr,  # (total_tokens, HEADS)
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotated_k_ptr,  # (total_tokens, KV_HEADS, BLOCK_D); unused without ROTARY, as the next three
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    tiles_ptr,
    num_slots,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr,
):
    _, row, length, tile = tile_at(tiles_ptr, num_slots, tl.program_id(0))
    if length == 0:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    qkv_ptr += row * STRIDE
    v_ptr = qkv_ptr + (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    if ROTARY:
        k_ptr = rotated_k_ptr + (row * KV_HEADS + kv_head) * BLOCK_D
        position_ids_ptr += row
    else:
        k_ptr = qkv_ptr + (HEADS + kv_head) * HEAD_DIM
    K_STRIDE: tl.constexpr = KV_HEADS * BLOCK_D if ROTARY else STRIDE
    K_COLUMNS: tl.constexpr = BLOCK_D if ROTARY else HEAD_DIM

    first = tile * BLOCK_M
    out_ptr += (row * HEADS + head) * HEAD_DIM  # rotated queries, then the output
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    q = load_query(
        qkv_ptr + head * HEAD_DIM, out_ptr, cos_ptr, sin_ptr, position_ids_ptr, first, length,
        STRIDE, OUT_STRIDE, HEAD_DIM // 2, HEAD_DIM, BLOCK_M, BLOCK_D, ROTARY,
    )  # fmt: skip
    ACCUMULATOR: tl.constexpr = logsumexp_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    peak = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
    end = tl.minimum(first + BLOCK_M, length) if CAUSAL else length
    all_visible = first if CAUSAL else length // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        acc, total, peak = _attend_to(
            acc, total, peak, q, k_ptr, v_ptr, first,
            all_visible if masked else 0, end if masked else all_visible, length,
            SCALE, K_STRIDE, K_COLUMNS, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, masked,
        )  # fmt: skip

    out = acc / total[:, None]
    store_tile(out_ptr, out, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    logsumexp = (peak + tl.log2(total)) * _LN_2
    tl.store(logsumexp_ptr + (row + query) * HEADS + head, logsumexp, mask=query < length)


def attend(
    qkv: Tensor,
    rotation: Rotation | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output (total_tokens, num_heads * head_dim) and logsumexp (total_tokens, num_heads)."""
    if cu_seqlens.is_cpu:  # on a GPU the check would synchronise
        check_offsets(cu_seqlens, max_seqlen, len(qkv))
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    settings = launch_attention.forward(qkv, head_dim)
    out, logsumexp = qkv.new_empty(len(qkv), num_heads * head_dim), empty_statistics(qkv, num_heads)
    tiles = attention_tiles(cu_seqlens, len(qkv), settings["BLOCK_M"], causal)
    if tiles.numel():
        rotated_k, cos, sin, position_ids = rotation or (None,) * 4
        _attention_fwd_kernel[(tiles.shape[1], num_heads)](
            out, logsumexp, qkv, rotated_k, cos, sin, position_ids, tiles, tiles.shape[1],
            SCALE=LOG2_E * head_dim**-0.5, HEADS=num_heads, KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim, CAUSAL=causal, ROTARY=rotation is not None, **settings,
        )  # fmt: skip
    return out, logsumexp


def full_attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> tuple[Tensor, Tensor]:
    heads = num_attention_heads
    return attend(qkv.contiguous(), None, cu_seqlens, max_seqlen, heads, heads, causal=False)


def full_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_attention_heads: int,
) -> Tensor:
    heads = num_attention_heads
    return attend_bwd(
        grad_out, qkv.contiguous(), out, logsumexp, None, cu_seqlens, heads, heads, causal=False
    )
