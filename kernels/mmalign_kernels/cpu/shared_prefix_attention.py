"""Attention after a shared prefix: the own keys by csrc/cpu, the prefix in plain PyTorch."""

from torch import Tensor

from ..reference.shared_prefix_attention import add_prefix, add_prefix_gradient
from .rotary_attention import rotary_attention_bwd, rotary_attention_fwd


def shared_prefix_attention_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, prefix_keys: Tensor, prefix_values: Tensor, num_attention_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    tables = cos, sin, position_ids
    own = rotary_attention_fwd(qkv, *tables, cu_seqlens, max_seqlen, *heads, True)
    return add_prefix(*own, qkv, *tables, prefix_keys, prefix_values)


def shared_prefix_attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, cu_seqlens: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
    max_seqlen: int, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    heads = num_attention_heads, prefix_keys.shape[1]
    saved, tables = (grad_out, qkv, out, logsumexp), (cos, sin, position_ids)
    grad_qkv = rotary_attention_bwd(*saved, *tables, cu_seqlens, max_seqlen, *heads, True)
    return add_prefix_gradient(grad_qkv, *saved, *tables, prefix_keys, prefix_values)
