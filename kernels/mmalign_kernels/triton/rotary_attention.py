"""Rotary attention in Triton: keys are rotated once, queries on load.

Columns i and i + head_dim / 2 of a head are rotated together, in fp32. Where to rotate is a
question of bytes. With 32 heads of 128 columns in bf16, q and k have 8 KiB per token each, and
attention itself must read 24 KiB and write 8 KiB:

                                         forward      backward
    q and k in a separate pass           + 32 KiB     + 32 KiB  read and written
    k in a separate pass, q on load      + 16 KiB     + 24 KiB  rotated q is written for dk
    both on load                         +  0         +  0

The last costs no bytes, but time in the loop: each of the ~ length / 256 programs of a head that
use a key would rotate it again, in registers between the copy and the product, while a matrix unit
reads its operand from shared memory: about as many instructions as the softmax, and no asynchronous
copy. A query belongs to one program, so rotating it on load costs a round trip through the rows of
the output in L1 (load_query). Hence the second option. With grouped queries the cost is per key
head: 4 KiB per token with 8 of them. Gradients of q and k get the inverse rotation in registers
before they are written.

Rotated keys are stored in tiles of BLOCK_D columns (attention_parts.py) with zeros between and
after the halves, so a head_dim of 100 is copied 16 bytes at a time, 4 or 8 from the projection.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_attention
from .attention_backward import attend_bwd
from .attention_parts import Rotation, load_angles, load_tile, rotate
from .common import upcast
from .full_attention import attend
from .launch import ceil_div


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_keys_kernel(
    rotated_ptr,  # (num_tokens, KV_HEADS, 2 * BLOCK_HALF), written
    qkv_ptr,  # (num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """A program owns ROWS tokens and SHARE heads, and loads the angles of its tokens once."""
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    cos, sin = load_angles(
        cos_ptr, sin_ptr, position_ids_ptr, first_row, num_tokens, HALF, ROWS, BLOCK_HALF
    )
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    first_head = tl.program_id(1) * SHARE
    for head in range(first_head, tl.minimum(first_head + SHARE, KV_HEADS)):
        k_ptr = qkv_ptr + (HEADS + head) * HEAD_DIM
        first = load_tile(k_ptr, first_row, num_tokens, STRIDE, HALF, ROWS, BLOCK_HALF, True)
        k_ptr += HALF
        second = load_tile(k_ptr, first_row, num_tokens, STRIDE, HALF, ROWS, BLOCK_HALF, True)
        first, second = rotate(upcast(first), upcast(second), cos, sin)
        ptrs = rotated_ptr + (row * KV_HEADS + head) * 2 * BLOCK_HALF + column
        inside = (row < num_tokens) & (column >= 0)  # zeros past HALF are written too
        tl.store(ptrs, first.to(rotated_ptr.dtype.element_ty), mask=inside)
        tl.store(ptrs + BLOCK_HALF, second.to(rotated_ptr.dtype.element_ty), mask=inside)


def _rotation(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int
) -> Rotation:
    """The tables, and a rotated copy of the keys."""
    num_tokens, columns = qkv.shape
    head_dim = columns // (num_heads + 2 * num_kv_heads)
    block_d = launch_attention.block_columns(head_dim)
    cos, sin, position_ids = cos.contiguous(), sin.contiguous(), position_ids.contiguous()
    rotated_k = qkv.new_empty(num_tokens, num_kv_heads, block_d)
    if num_tokens:
        rows, share = launch_attention.rotate_keys(qkv, head_dim)
        _rotate_keys_kernel[(ceil_div(num_tokens, rows), ceil_div(num_kv_heads, share))](
            rotated_k, qkv, cos, sin, position_ids, num_tokens, HEADS=num_heads,
            KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROWS=rows, SHARE=share,
            BLOCK_HALF=block_d // 2,
        )  # fmt: skip
    return Rotation(rotated_k, cos, sin, position_ids)


def rotary_attention_fwd(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    heads = num_attention_heads, num_key_value_heads
    rotation = _rotation(qkv, cos, sin, position_ids, *heads)
    return attend(qkv, rotation, cu_seqlens, max_seqlen, *heads, causal)


def rotary_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    causal: bool,
) -> Tensor:
    qkv = qkv.contiguous()
    heads = num_attention_heads, num_key_value_heads
    rotation = _rotation(qkv, cos, sin, position_ids, *heads)
    return attend_bwd(grad_out, qkv, out, logsumexp, rotation, cu_seqlens, *heads, causal)
