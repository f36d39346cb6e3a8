"""Attention by FlashAttention-3 (module flash_attn_interface): Shah et al. 2024 (2407.08608).

Called below its autograd function, as the operations here keep the logsumexp themselves.
Deterministic where torch.use_deterministic_algorithms is on.
"""

import torch
from flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from torch import Tensor

from .library_attention import LibraryAttention, Samples


def _forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = _flash_attn_forward(
        q,
        k,
        v,
        cu_seqlens_q=samples.cu_seqlens,
        cu_seqlens_k=samples.cu_seqlens,
        max_seqlen_q=samples.max_seqlen,
        max_seqlen_k=samples.max_seqlen,
        softmax_scale=samples.scale,
        causal=samples.causal,
    )
    return out, logsumexp


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    samples: Samples,
    rooms: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    _flash_attn_backward(
        *(grad_out, q, k, v, out, logsumexp, samples.cu_seqlens, samples.cu_seqlens, None, None),
        *(samples.max_seqlen, samples.max_seqlen, *rooms, samples.scale, samples.causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return rooms


full_attention_fwd, full_attention_bwd, rotary_attention_fwd, rotary_attention_bwd = (
    LibraryAttention("flash_attn_3", _forward, _backward).operations
)
