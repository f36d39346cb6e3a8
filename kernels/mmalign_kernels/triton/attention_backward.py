"""Flash attention over packed samples in Triton, backward, into one gradient of the projection.

    p = exp(q k^T / sqrt(head_dim) - logsumexp)      ds = p * (grad_out v^T - sum(grad_out * out))
    dq = ds k / sqrt(head_dim)    dk = ds^T q / sqrt(head_dim)    dv = p^T grad_out

Two kernels, no atomics: deterministic. The programs of the first own queries and write dq, and also
write what the second reads: rotated q, and every row's logsumexp and delta = sum(grad_out * out) by
heads, with a gap after every sample, so that a tile beyond the end reads p = 0 and needs no mask.
The programs of the second own keys, loop over the queries of all heads of their group in a fixed
order, and write dk and dv. Scores are computed twice: 7 products instead of 5 with atomics.

Bytes per token with 32 heads of 128 columns in bf16: the first reads q, k, v, out, grad_out and
writes dq and rotated q, 56 KiB; the second reads q, k, v, grad_out and writes dk, dv, 48 KiB.
FLOPs: 14 * heads * head_dim per visible pair of query and key.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_attention
from .attention_parts import (
    LOG2_E,
    Rotation,
    load_query,
    load_tile,
    store_gradient,
    store_tile,
)
from .attention_tiles import attention_tiles, tile_at
from .common import upcast

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _dq_from(
    dq,
    q,
    grad_out,
    logsumexp,
    delta,
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
    """Accumulate dq over the keys begin..end; MASKED if some are hidden from some queries."""
    query = first_query + tl.arange(0, BLOCK_M)[:, None]
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, length, K_STRIDE, K_COLUMNS, BLOCK_N, BLOCK_D, MASKED)
        v = load_tile(v_ptr, start, length, V_STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        p = tl.exp2(scores * SCALE - logsumexp[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)[None, :]
            visible = key <= query if CAUSAL else (key < length) & (query >= 0)
            p = tl.where(visible, p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, "ieee", out_dtype=dq.dtype)
    return dq


@triton.jit(do_not_specialize=["num_slots", "statistics_stride"])
def _attention_dq_kernel(
    grad_qkv_ptr,  # like qkv; its first HEADS * HEAD_DIM columns are written
    rotated_q_ptr,  # (total_tokens, HEADS, BLOCK_D), written; unused without ROTARY
    statistics_ptr,  # (2, HEADS, statistics_stride) fp32, written: logsumexp (base 2), delta
    grad_out_ptr,  # (total_tokens, HEADS * HEAD_DIM)
    out_ptr,
    logsumexp_ptr,  # (total_tokens, HEADS)
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotated_k_ptr,  # (total_tokens, KV_HEADS, BLOCK_D); unused without ROTARY, as the next three
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    tiles_ptr,
    num_slots,
    statistics_stride,
    SCALE: tl.constexpr,
    GAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr,
):
    sample, row, length, tile = tile_at(tiles_ptr, num_slots, tl.program_id(0))
    if length == 0:
        return
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
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
    query = first + tl.arange(0, BLOCK_M)
    known = query < length
    offset = row * OUT_STRIDE + head * HEAD_DIM
    out = load_tile(out_ptr + offset, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    grad_out = load_tile(
        grad_out_ptr + offset, first, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True
    )
    delta = tl.sum(upcast(out) * upcast(grad_out), 1)
    logsumexp = tl.load(
        logsumexp_ptr + (row + query) * HEADS + head, mask=known, other=float("inf")
    )
    logsumexp *= _LOG2_E
    statistics_ptr += head * statistics_stride.to(tl.int64) + row + sample * GAP + query
    tl.store(statistics_ptr, logsumexp)  # inf in the gap
    tl.store(statistics_ptr + HEADS * statistics_stride.to(tl.int64), delta)
    if ROTARY:
        rotated_q_ptr += (row * HEADS + head) * BLOCK_D
    q = load_query(
        qkv_ptr + head * HEAD_DIM, rotated_q_ptr, cos_ptr, sin_ptr, position_ids_ptr, first, length,
        STRIDE, HEADS * BLOCK_D, BLOCK_D // 2, HEAD_DIM, BLOCK_M, BLOCK_D, ROTARY,
    )  # fmt: skip

    dq = tl.zeros((BLOCK_M, BLOCK_D), delta.dtype)
    end = tl.minimum(first + BLOCK_M, length) if CAUSAL else length
    all_visible = first if CAUSAL else length // BLOCK_N * BLOCK_N
    for masked in tl.static_range(2):
        dq = _dq_from(
            dq, q, grad_out, logsumexp, delta, k_ptr, v_ptr, first,
            all_visible if masked else 0, end if masked else all_visible, length,
            SCALE, K_STRIDE, K_COLUMNS, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, masked,
        )  # fmt: skip
    store_gradient(
        grad_qkv_ptr + row * STRIDE + head * HEAD_DIM, dq * (SCALE / _LOG2_E),
        cos_ptr, sin_ptr, position_ids_ptr,
        first, length, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, ROTARY,
    )  # fmt: skip


@triton.jit
def _dkv_from(
    dk,
    dv,
    k,
    v,
    q_ptr,
    grad_out_ptr,
    logsumexp_ptr,
    delta_ptr,
    first_key,
    begin,
    end,
    length,
    SCALE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Q_COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Accumulate over the queries begin..end of one head; MASKED if some keys are hidden.

    Products are transposed, keys by queries, so that p and ds enter the next product from
    registers. Rows past the end have logsumexp = inf in memory, so p = 0 without a mask.
    """
    for start in range(begin, end, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, start, length, Q_STRIDE, Q_COLUMNS, BLOCK_M, BLOCK_D, True)
        logsumexp = tl.load(logsumexp_ptr + query)
        grad_out = load_tile(
            grad_out_ptr, start, length, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True
        )
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        p = tl.exp2(scores * SCALE - logsumexp[None, :])
        if MASKED:
            key = first_key + tl.arange(0, BLOCK_N)
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, "ieee", out_dtype=dv.dtype)
        delta = tl.load(delta_ptr + query)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, "ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def _owned_keys(tiles_ptr, num_slots, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Index of the sample, its first row, its length, and the first key of the tile."""
    sample, row, length, tile = tile_at(tiles_ptr, num_slots, tl.program_id(0))
    if CAUSAL:  # the first keys are visible to the most queries
        tile = tl.cdiv(length, BLOCK_N) - 1 - tile
    return sample, row, length, tile * BLOCK_N


@triton.jit(do_not_specialize=["num_slots", "statistics_stride"])
def _attention_dkv_kernel(
    grad_qkv_ptr,  # like qkv; its last 2 * KV_HEADS * HEAD_DIM columns are written
    rotated_q_ptr,  # (total_tokens, HEADS, BLOCK_D); unused without ROTARY
    statistics_ptr,  # (2, HEADS, statistics_stride) fp32: logsumexp (base 2), delta
    grad_out_ptr,  # (total_tokens, HEADS * HEAD_DIM)
    qkv_ptr,  # (total_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotated_k_ptr,  # (total_tokens, KV_HEADS, BLOCK_D); unused without ROTARY, as the next three
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    tiles_ptr,
    num_slots,
    statistics_stride,
    SCALE: tl.constexpr,
    GAP: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr,
):
    sample, row, length, first = _owned_keys(tiles_ptr, num_slots, BLOCK_N, CAUSAL)
    if length == 0:
        return
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    Q_STRIDE: tl.constexpr = HEADS * BLOCK_D if ROTARY else STRIDE
    Q_COLUMNS: tl.constexpr = BLOCK_D if ROTARY else HEAD_DIM
    K_STRIDE: tl.constexpr = KV_HEADS * BLOCK_D if ROTARY else STRIDE
    grad_out_ptr += row * OUT_STRIDE
    statistics_ptr += row + sample * GAP
    qkv_ptr += row * STRIDE
    if ROTARY:
        q_ptr = rotated_q_ptr + row * Q_STRIDE
        k_ptr = rotated_k_ptr + (row * KV_HEADS + kv_head) * BLOCK_D
    else:
        q_ptr = qkv_ptr
        k_ptr = qkv_ptr + (HEADS + kv_head) * HEAD_DIM

    v_offset = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    k = load_tile(k_ptr, first, length, K_STRIDE, Q_COLUMNS, BLOCK_N, BLOCK_D, True)
    v = load_tile(qkv_ptr + v_offset, first, length, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), statistics_ptr.dtype.element_ty)
    dv = tl.zeros((BLOCK_N, BLOCK_D), statistics_ptr.dtype.element_ty)
    all_visible = first + BLOCK_N if CAUSAL else 0
    for i in range(GROUP):
        head = kv_head * GROUP + i
        logsumexp_ptr = statistics_ptr + head * statistics_stride.to(tl.int64)
        for masked in tl.static_range(CAUSAL, -1, -1):
            dk, dv = _dkv_from(
                dk, dv, k, v, q_ptr + head * Q_COLUMNS, grad_out_ptr + head * HEAD_DIM,
                logsumexp_ptr, logsumexp_ptr + HEADS * statistics_stride.to(tl.int64), first,
                first if masked else all_visible,
                tl.minimum(all_visible, length) if masked else length, length,
                SCALE, Q_STRIDE, Q_COLUMNS, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, masked,
            )  # fmt: skip
    _, row, length, first = _owned_keys(tiles_ptr, num_slots, BLOCK_N, CAUSAL)
    grad_qkv_ptr += row * STRIDE
    if ROTARY:
        position_ids_ptr += row
    store_tile(grad_qkv_ptr + v_offset, dv, first, length, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_gradient(
        grad_qkv_ptr + (HEADS + kv_head) * HEAD_DIM, dk * (SCALE / _LOG2_E),
        cos_ptr, sin_ptr, position_ids_ptr,
        first, length, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, ROTARY,
    )  # fmt: skip


def attend_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rotation: Rotation | None,
    cu_seqlens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    causal: bool,
) -> Tensor:
    """Gradient of qkv."""
    num_tokens, columns = qkv.shape
    head_dim = columns // (num_heads + 2 * num_kv_heads)
    dq_settings, dkv_settings = launch_attention.backward(qkv, head_dim)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_out = grad_out.contiguous()
    tiles = attention_tiles(cu_seqlens, num_tokens, dq_settings["BLOCK_M"], causal)
    if not tiles.numel():
        return grad_qkv
    rotated_k, cos, sin, position_ids = rotation or (None,) * 4
    rotated_q = rotation and qkv.new_empty(num_tokens, num_heads, dq_settings["BLOCK_D"])
    gap = dq_settings["BLOCK_M"]
    statistics = logsumexp.new_empty(2, num_heads, num_tokens + gap * (len(cu_seqlens) - 1))
    common = dict(
        SCALE=LOG2_E * head_dim**-0.5, GAP=gap, HEADS=num_heads, KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim, CAUSAL=causal, ROTARY=rotation is not None,
    )  # fmt: skip
    num_slots = tiles.shape[1]
    _attention_dq_kernel[(num_slots, num_heads)](
        grad_qkv, rotated_q, statistics, grad_out, out, logsumexp, qkv, rotated_k, cos, sin,
        position_ids, tiles, num_slots, statistics.shape[2], **common, **dq_settings,
    )  # fmt: skip
    if dkv_settings["BLOCK_N"] != dq_settings["BLOCK_M"]:
        tiles = attention_tiles(cu_seqlens, num_tokens, dkv_settings["BLOCK_N"], causal)
        num_slots = tiles.shape[1]
    _attention_dkv_kernel[(num_slots, num_kv_heads)](
        grad_qkv, rotated_q, statistics, grad_out, qkv, rotated_k, cos, sin,
        position_ids, tiles, num_slots, statistics.shape[2], **common, **dkv_settings,
    )  # fmt: skip
    return grad_qkv
