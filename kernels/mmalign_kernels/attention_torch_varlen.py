"""Attention by PyTorch's variable-length attention: its own FlashAttention, CUDA only.

The two operators under torch.nn.attention.varlen.varlen_attn, called directly: its wrapper changed
its signature from release to release (2.10 to 2.13: the causal window, enable_gqa) and has no
backward pass without autograd, while these take the same arguments in all of them. Fewer key heads
are their own business. Deterministic where torch.use_deterministic_algorithms is on.
"""

import torch
from torch import Tensor

from .library_attention import LibraryAttention, Samples

aten = torch.ops.aten


def _offsets(samples: Samples) -> tuple:
    """Queries and keys have the same samples."""
    return (*(samples.cu_seqlens,) * 2, *(samples.max_seqlen,) * 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = aten._flash_attention_forward(
        q, k, v, *_offsets(samples), 0.0, samples.causal, False, scale=samples.scale
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
    _: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is off
    return aten._flash_attention_backward(
        *(grad_out, q, k, v, out, logsumexp, *_offsets(samples), 0.0, samples.causal, rng_state),
        torch.empty(0, device=q.device),
        scale=samples.scale,
    )


full_attention_fwd, full_attention_bwd, rotary_attention_fwd, rotary_attention_bwd = (
    LibraryAttention("torch_varlen", _forward, _backward).operations
)
