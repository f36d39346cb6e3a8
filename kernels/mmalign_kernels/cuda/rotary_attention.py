"""Rotary attention by the CUDA kernels of csrc/rotary_attention*.cu, for Hopper.

bf16 and fp16 with a head_dim of 64 or 128; anything else is refused, and Triton computes it. Output
and logsumexp are as Triton's: one may go forward and the other backward.
"""

import torch
from torch import Tensor

from ..operation import empty_statistics
from .library import fake, operation


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
    """max_seqlen is not needed: the kernel reads the lengths from cu_seqlens."""
    return operation("rotary_attention_fwd")(
        qkv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        position_ids.to(torch.int32).contiguous(),
        cu_seqlens.to(torch.int32).contiguous(),
        num_attention_heads,
        num_key_value_heads,
        causal,
    )


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
    """Gradient of qkv, the same bits every time. max_seqlen as above."""
    return operation("rotary_attention_bwd")(
        grad_out.contiguous(),
        qkv.contiguous(),
        out.contiguous(),
        logsumexp.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        position_ids.to(torch.int32).contiguous(),
        cu_seqlens.to(torch.int32).contiguous(),
        num_attention_heads,
        num_key_value_heads,
        causal,
    )


@fake("rotary_attention_fwd")
def _rotary_attention_fwd(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    num_attention_heads: int,
    num_key_value_heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    head_dim = qkv.shape[1] // (num_attention_heads + 2 * num_key_value_heads)
    out = qkv.new_empty((qkv.shape[0], num_attention_heads * head_dim))
    return out, empty_statistics(qkv, num_attention_heads)


@fake("rotary_attention_bwd")
def _rotary_attention_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    num_attention_heads: int,
    num_key_value_heads: int,
    causal: bool,
) -> Tensor:
    return qkv.new_empty(qkv.shape)
