"""Attention by xformers' memory_efficient_attention, which takes its best operator for the GPU.

Its five-dimensional layout for fewer key heads has no backward pass, so keys and values are
repeated for every query head, and their gradients summed. Its mask wants the lengths on the host:
one wait for the device for every new cu_seqlens, not for every layer.
"""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from xformers.ops import (
    memory_efficient_attention_backward,
    memory_efficient_attention_forward_requires_grad,
)
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

from .library_attention import LibraryAttention, Samples

_masks = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, the mask)


def _mask(samples: Samples) -> BlockDiagonalMask:
    cu_seqlens = samples.cu_seqlens
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _masks.get(cu_seqlens)
    if known is None or known[0] != version or version is None:
        lengths = cu_seqlens.diff().tolist()
        known = version, BlockDiagonalMask.from_seqlens(lengths, device=cu_seqlens.device)
        _masks[cu_seqlens] = known
    return known[1].make_causal() if samples.causal else known[1]


def _repeated(x: Tensor, num_heads: int) -> Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _summed(grad: Tensor, num_heads: int) -> Tensor:
    """(total_tokens, query heads, head_dim) -> (total_tokens, num_heads, head_dim)."""
    return grad if grad.shape[1] == num_heads else grad.unflatten(1, (num_heads, -1)).sum(2)


def _forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    q, k, v = (_repeated(x, q.shape[1])[None] for x in (q, k, v))  # one batch of all samples
    out, logsumexp = memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=_mask(samples), scale=samples.scale
    )
    if logsumexp.shape[0] != 1 or logsumexp.shape[2] < q.shape[1]:
        raise NotImplementedError(
            "attention: backend xformers chose an operator that pads the logsumexp to "
            f"{tuple(logsumexp.shape)}; its FlashAttention operators are needed. "
            "python -m xformers.info says which it has"
        )
    return out[0], logsumexp[0, :, : q.shape[1]]


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
    wide = ((_repeated(x, q.shape[1]))[None] for x in (q, k, v))
    grads = memory_efficient_attention_backward(
        grad_out[None],
        out[None],
        logsumexp[None],
        *wide,
        attn_bias=_mask(samples),
        scale=samples.scale,
    )
    return tuple(_summed(x[0], y.shape[1]) for x, y in zip(grads, (q, k, v), strict=True))


full_attention_fwd, full_attention_bwd, rotary_attention_fwd, rotary_attention_bwd = (
    LibraryAttention("xformers", _forward, _backward).operations
)
