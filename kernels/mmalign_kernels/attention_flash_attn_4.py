"""Attention by FlashAttention-4 (package flash_attn_4, module flash_attn.cute), in CuTe DSL.

Called below its autograd function, as the operations here keep the logsumexp themselves. Its
backward pass needs Hopper or later. Deterministic where torch.use_deterministic_algorithms is on.
"""

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from .library_attention import LibraryAttention, Samples


def _settings(samples: Samples) -> dict:
    return dict(
        cu_seqlens_q=samples.cu_seqlens,
        cu_seqlens_k=samples.cu_seqlens,
        max_seqlen_q=samples.max_seqlen,
        max_seqlen_k=samples.max_seqlen,
        softmax_scale=samples.scale,
        causal=samples.causal,
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **_settings(samples))
    return out, logsumexp


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    samples: Samples,
    _: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad_out, logsumexp, deterministic=deterministic, **_settings(samples)
    )
    return dq, dk, dv


full_attention_fwd, full_attention_bwd, rotary_attention_fwd, rotary_attention_bwd = (
    LibraryAttention("flash_attn_4", _forward, _backward).operations
)
