"""Rotary attention by the CUDA kernels of csrc/rotary_attention*.cu, for Hopper.

bf16 and fp16 with a head_dim of 64 or 128; anything else is an error (Triton computes it). Output
and logsumexp have Triton's layout: one backend may run forward and the other backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..rotary_attention import rotary_attention_bwd as declared_bwd
from ..rotary_attention import rotary_attention_fwd as declared_fwd
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
    """max_seqlen is unused: the kernel reads the lengths from cu_seqlens."""
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
    """Gradient of qkv, deterministic. max_seqlen is unused."""
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


def _with_max_seqlen(declaration: Callable, position: int) -> Callable:
    """The declaration as a function of the CUDA operation's arguments, which lack max_seqlen."""
    return lambda *args: declaration(*args[:position], 0, *args[position:])


fake("rotary_attention_fwd", _with_max_seqlen(declared_fwd.declaration, 5))
fake("rotary_attention_bwd", _with_max_seqlen(declared_bwd.declaration, 8))
