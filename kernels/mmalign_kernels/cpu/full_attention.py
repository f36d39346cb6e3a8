"""Full attention by csrc/cpu/rotary_attention*.cpp: neither rotated nor causal."""

import torch
from torch import Tensor

from ..reference import full_attention as reference
from .rotary_attention import attend, attend_bwd


def full_attention_fwd(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int
) -> tuple[Tensor, Tensor]:
    if qkv.dtype != torch.float32:
        return reference.full_attention_fwd(qkv, cu_seqlens, max_seqlen, num_attention_heads)
    heads = num_attention_heads, num_attention_heads
    return attend(qkv, None, None, None, cu_seqlens, max_seqlen, *heads, False)


def full_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    saved = grad_out, qkv, out, logsumexp
    if qkv.dtype != torch.float32:
        settings = cu_seqlens, max_seqlen, num_attention_heads
        return reference.full_attention_bwd(*saved, *settings)
    heads = num_attention_heads, num_attention_heads
    return attend_bwd(*saved, None, None, None, cu_seqlens, *heads, False)
