"""Attention after a shared prefix in Triton: the prefix is merged into rotary attention's output.

Any backend of rotary attention runs on the samples' own keys. Then a program owns BLOCK_M rows of
one head. Forward, it continues the softmax from rotary attention's output and logsumexp over the
prefix's keys and writes both back. Backward, rotary attention runs with the merged output and
logsumexp; this kernel adds the prefix's part to the queries' gradient. Queries are rotated on load,
their gradient by the inverse before it is added.

Bytes per token with 32 heads of 128 columns in bf16: forward reads q and out, writes out, 24 KiB;
backward reads q, out, grad_out and dq, writes dq, 40 KiB. The prefix stays in L2. FLOPs per token:
4 forward, 6 backward, times heads * head_dim * prefix_length.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..rotary_attention import rotary_attention_bwd, rotary_attention_fwd
from . import launch_attention
from .attention_backward import _dq_from
from .attention_parts import (
    LN_2,
    LOG2_E,
    load_angles,
    load_query,
    load_tile,
    rotate_inverse,
    split_halves,
    store_tile,
)
from .common import upcast
from .full_attention import _attend_to
from .launch import ceil_div

_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def _join_prefix_kernel(
    out_ptr,  # (num_tokens, HEADS * HEAD_DIM): in, over the own keys; out, over all
    logsumexp_ptr,  # (num_tokens, HEADS), in and out as out_ptr
    qkv_ptr,  # (num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys_ptr,  # (num_keys, KV_HEADS, BLOCK_D), halves as in a tile
    values_ptr,  # (num_keys, KV_HEADS, HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    num_tokens,
    num_keys,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, head = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    row = first + tl.arange(0, BLOCK_M)
    known = row < num_tokens
    logsumexp_ptr += row * HEADS + head
    peak = tl.load(logsumexp_ptr, mask=known, other=0.0) * _LOG2_E
    total = tl.full((BLOCK_M,), 1.0, peak.dtype)
    out_ptr += head * HEAD_DIM
    own = load_tile(out_ptr, first, num_tokens, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    tl.debug_barrier()  # all of out is read before rotated queries take its place
    q = load_query(
        qkv_ptr + head * HEAD_DIM, out_ptr, cos_ptr, sin_ptr, position_ids_ptr, first, num_tokens,
        STRIDE, OUT_STRIDE, HEAD_DIM // 2, HEAD_DIM, BLOCK_M, BLOCK_D, True,
    )  # fmt: skip
    acc, total, peak = _attend_to(
        upcast(own), total, peak, q, keys_ptr + kv_head * BLOCK_D, values_ptr + kv_head * HEAD_DIM,
        0, 0, num_keys, num_keys,
        SCALE, KV_HEADS * BLOCK_D, BLOCK_D, KV_HEADS * HEAD_DIM, HEAD_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, False, True,
    )  # fmt: skip
    out = acc / total[:, None]
    store_tile(out_ptr, out, first, num_tokens, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(logsumexp_ptr, (peak + tl.log2(total)) * _LN_2, mask=known)


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def _prefix_dq_kernel(
    grad_qkv_ptr,  # like qkv; the prefix's part is added to its first HEADS * HEAD_DIM columns
    grad_out_ptr,  # (num_tokens, HEADS * HEAD_DIM)
    out_ptr,  # (num_tokens, HEADS * HEAD_DIM)
    logsumexp_ptr,  # (num_tokens, HEADS)
    qkv_ptr,  # (num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys_ptr,  # (num_keys, KV_HEADS, BLOCK_D), halves as in a tile
    values_ptr,  # (num_keys, KV_HEADS, HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    num_tokens,
    num_keys,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first, head = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2
    grad_out_ptr += head * HEAD_DIM
    grad_out = load_tile(
        grad_out_ptr, first, num_tokens, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True
    )
    out_ptr += head * HEAD_DIM
    out = load_tile(out_ptr, first, num_tokens, OUT_STRIDE, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(upcast(out) * upcast(grad_out), 1)
    row = first + tl.arange(0, BLOCK_M)
    logsumexp = tl.load(
        logsumexp_ptr + row * HEADS + head, mask=row < num_tokens, other=float("inf")
    )
    grad_ptr = grad_qkv_ptr + head * HEAD_DIM
    own_low = load_tile(grad_ptr, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True)
    own_high = load_tile(
        grad_ptr + HALF, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF, True
    )
    tl.debug_barrier()  # all of it is read before rotated queries take its place
    q = load_query(
        qkv_ptr + head * HEAD_DIM, grad_ptr, cos_ptr, sin_ptr, position_ids_ptr, first, num_tokens,
        STRIDE, STRIDE, HALF, HEAD_DIM, BLOCK_M, BLOCK_D, True,
    )  # fmt: skip
    dq = _dq_from(
        tl.zeros((BLOCK_M, BLOCK_D), delta.dtype), q, grad_out, logsumexp * _LOG2_E, delta,
        keys_ptr + kv_head * BLOCK_D, values_ptr + kv_head * HEAD_DIM, 0, 0, num_keys, num_keys,
        SCALE, KV_HEADS * BLOCK_D, BLOCK_D, KV_HEADS * HEAD_DIM, HEAD_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, False, True,
    )  # fmt: skip
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, first, num_tokens, HALF, BLOCK_M, BLOCK_HALF
    )
    low, high = split_halves(dq * (SCALE / _LOG2_E), BLOCK_M, BLOCK_D)
    low, high = rotate_inverse(low, high, cos, sin)
    low, high = low + upcast(own_low), high + upcast(own_high)
    store_tile(grad_ptr, low, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF)
    store_tile(grad_ptr + HALF, high, first, num_tokens, STRIDE, HALF, BLOCK_M, BLOCK_HALF)


def _launch(kernel, written: tuple, qkv: Tensor, keys: Tensor, values: Tensor, rotation: tuple):
    """`written`: the kernel's arguments before qkv."""
    num_keys, num_kv_heads, head_dim = keys.shape
    if not len(qkv) or not num_keys:
        return
    settings = launch_attention.shared_prefix(qkv, head_dim)
    missing = settings["BLOCK_D"] // 2 - head_dim // 2
    if missing:  # zeros between and after the halves, as in a tile of queries
        keys = F.pad(keys.unflatten(2, (2, -1)), (0, missing)).flatten(2)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    kernel[(ceil_div(len(qkv), settings["BLOCK_M"]), num_heads)](
        *written, qkv, keys.contiguous(), values.contiguous(), *(x.contiguous() for x in rotation),
        len(qkv), num_keys, SCALE=LOG2_E * head_dim**-0.5, HEADS=num_heads, KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim, **settings,
    )  # fmt: skip


def shared_prefix_attention_fwd(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    num_attention_heads: int,
) -> tuple[Tensor, Tensor]:
    qkv, rotation = qkv.contiguous(), (cos, sin, position_ids)
    heads = num_attention_heads, prefix_keys.shape[1]
    written = rotary_attention_fwd.run(qkv, *rotation, cu_seqlens, max_seqlen, *heads, True)
    _launch(_join_prefix_kernel, written, qkv, prefix_keys, prefix_values, rotation)
    return written


def shared_prefix_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    max_seqlen: int,
    num_attention_heads: int,
) -> Tensor:
    grad_out, qkv, rotation = grad_out.contiguous(), qkv.contiguous(), (cos, sin, position_ids)
    heads = num_attention_heads, prefix_keys.shape[1]
    grad_qkv = rotary_attention_bwd.run(
        grad_out, qkv, out, logsumexp, *rotation, cu_seqlens, max_seqlen, *heads, True
    )
    written = grad_qkv, grad_out, out, logsumexp
    _launch(_prefix_dq_kernel, written, qkv, prefix_keys, prefix_values, rotation)
    return grad_qkv
