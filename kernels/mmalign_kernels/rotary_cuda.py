"""Rotary attention by the CUDA kernel of csrc/rotary_attention.cu, for Hopper.

Forward in bf16 and fp16 with a head_dim of 64 or 128; anything else is refused, and Triton computes
it. The backward pass is Triton's, on the output and the logsumexp of this forward pass.
"""

import torch
from torch import Tensor

from . import cuda_library
from .cuda_library import operation
from .rms_norm import statistics
from .rotary_triton import rotary_attention_bwd

__all__ = ["rotary_attention_bwd", "rotary_attention_fwd"]


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


@cuda_library.fake("rotary_attention_fwd")
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
    return out, statistics(qkv, num_attention_heads)
