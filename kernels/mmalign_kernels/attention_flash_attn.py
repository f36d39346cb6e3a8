"""Attention by FlashAttention-2 (package flash_attn, 2.7 or later): Dao 2023 (arXiv 2307.08691).

Called below its autograd function, as the operations here keep the logsumexp themselves. Fewer key
heads are its own business. Deterministic where torch.use_deterministic_algorithms is on.
"""

import torch
from flash_attn.flash_attn_interface import (
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from torch import Tensor

from .library_attention import LibraryAttention, Samples


def _offsets(samples: Samples) -> tuple:
    """Queries and keys have the same samples."""
    return (*(samples.cu_seqlens,) * 2, *(samples.max_seqlen,) * 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = _flash_attn_varlen_forward(
        q, k, v, *_offsets(samples), 0.0, samples.scale, samples.causal
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
    _flash_attn_varlen_backward(
        *(grad_out, q, k, v, out, logsumexp, *rooms, *_offsets(samples)),
        *(0.0, samples.scale, samples.causal),
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return rooms


full_attention_fwd, full_attention_bwd, rotary_attention_fwd, rotary_attention_bwd = (
    LibraryAttention("flash_attn", _forward, _backward).operations
)
