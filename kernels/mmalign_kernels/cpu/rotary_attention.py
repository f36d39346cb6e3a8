"""Rotary attention by csrc/cpu/rotary_attention*.cpp."""

import torch
from torch import Tensor

from ..operation import check_offsets
from ..reference import rotary_attention as reference
from .library import operation


def attend(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, position_ids: Tensor | None,
    cu_seqlens: Tensor, max_seqlen: int, *settings: int | bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and logsumexp; without cos and sin there is no rotation."""
    check_offsets(cu_seqlens, max_seqlen, len(qkv))
    tables = _dense(cos, sin, position_ids)
    return operation("attention_fwd")(qkv.contiguous(), *tables, cu_seqlens.int(), *settings)


def attend_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor | None,
    sin: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor, *settings: int | bool,
) -> Tensor:  # fmt: skip
    saved = (x.contiguous() for x in (grad_out, qkv, out, logsumexp))
    tables = _dense(cos, sin, position_ids)
    return operation("attention_bwd")(*saved, *tables, cu_seqlens.int(), *settings)


def _dense(
    cos: Tensor | None, sin: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, ...]:
    if cos is None or sin is None or position_ids is None:
        return None, None, None
    return cos.contiguous(), sin.contiguous(), position_ids.int().contiguous()


def rotary_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, num_attention_heads: int, num_key_value_heads: int, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    settings = (max_seqlen, num_attention_heads, num_key_value_heads, causal)
    if qkv.dtype != torch.float32:
        tables = cos, sin, position_ids
        return reference.rotary_attention_fwd(qkv, *tables, cu_seqlens, *settings)
    return attend(qkv, cos, sin, position_ids, cu_seqlens, *settings)


def rotary_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_attention_heads: int,
    num_key_value_heads: int, causal: bool,
) -> Tensor:  # fmt: skip
    saved, tables = (grad_out, qkv, out, logsumexp), (cos, sin, position_ids, cu_seqlens)
    heads = num_attention_heads, num_key_value_heads
    if qkv.dtype != torch.float32:
        return reference.rotary_attention_bwd(*saved, *tables, max_seqlen, *heads, causal)
    return attend_bwd(*saved, *tables, *heads, causal)
