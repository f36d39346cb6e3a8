"""Attention by a library: what lies between our flat projection and its separate q, k and v.

A library takes (total_tokens, heads, head_dim) with the last dimension contiguous and a head_dim
that is a multiple of 8; other head dims (100) are filled up with zeros, which change neither
scores nor outputs. Queries and keys turn before, in a pass of our own; gradients turn back after.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .libraries import check
from .rms_norm import statistics

_MULTIPLE = 8  # of 16-bit columns: 16 bytes


class Samples(NamedTuple):
    """What a library is told beside q, k and v."""

    cu_seqlens: Tensor  # int32
    max_seqlen: int
    causal: bool
    scale: float


# q, k, v, samples -> out like q, logsumexp (heads, total_tokens)
Forward = Callable[[Tensor, Tensor, Tensor, Samples], tuple[Tensor, Tensor]]
# grad_out, q, k, v, out, logsumexp, samples, rooms -> dq, dk, dv, in the rooms or not
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def _rotate(x: Tensor, angles: tuple, out: Tensor, back: bool) -> None:
    function = dispatch.implementation("rotate_heads", "rotation", x.device.type)
    function(x, *angles, out, back)


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


def _parts(qkv: Tensor, angles: tuple | None, num_heads: int, num_kv_heads: int) -> tuple:
    """q and k, turned where there are angles, and v: (total_tokens, heads, padded head_dim)."""
    heads = qkv.contiguous().unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    turning, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if angles is None:
        return (*(_padded(x) for x in turning.split((num_heads, num_kv_heads), 1)), _padded(v))
    head_dim = heads.shape[2]
    missing = -head_dim % _MULTIPLE
    room = qkv.new_zeros if missing else qkv.new_empty
    turned = room((len(qkv), num_heads + num_kv_heads, head_dim + missing))
    _rotate(turning, angles, turned[..., :head_dim], back=False)
    return (*turned.split((num_heads, num_kv_heads), 1), _padded(v))


class LibraryAttention:
    """The four operations of attention by one library."""

    def __init__(self, backend: str, forward: Forward, backward: Backward):
        self.backend, self.forward, self.backward = backend, forward, backward

    def _attend(
        self, name: str, qkv: Tensor, angles: tuple | None, cu_seqlens: Tensor, max_seqlen: int,
        num_heads: int, num_kv_heads: int, causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        check(self.backend, name, qkv, head_dim)
        if not len(qkv):
            return qkv.new_empty(0, num_heads * head_dim), statistics(qkv, num_heads)
        q, k, v = _parts(qkv, angles, num_heads, num_kv_heads)
        samples = Samples(cu_seqlens.int(), max_seqlen, causal, head_dim**-0.5)
        out, logsumexp = self.forward(q, k, v, samples)
        return out[..., :head_dim].reshape(len(qkv), -1), logsumexp.t().contiguous()

    def _attend_bwd(
        self, name: str, grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor,
        angles: tuple | None, cu_seqlens: Tensor, max_seqlen: int, num_heads: int,
        num_kv_heads: int, causal: bool,
    ) -> Tensor:  # fmt: skip
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        check(self.backend, name, qkv, head_dim)
        grad_qkv = qkv.new_empty(qkv.shape)
        if not len(qkv):
            return grad_qkv
        parts = _parts(qkv, angles, num_heads, num_kv_heads)
        grad_out, out = (_padded(x.unflatten(1, (num_heads, -1))) for x in (grad_out, out))
        samples = Samples(cu_seqlens.int(), max_seqlen, causal, head_dim**-0.5)
        logsumexp = logsumexp.t().contiguous()
        sizes = num_heads, num_kv_heads, num_kv_heads
        views = grad_qkv.unflatten(1, (sum(sizes), -1)).split(sizes, 1)
        rooms = views if head_dim % _MULTIPLE == 0 else tuple(map(torch.empty_like, parts))
        grads = self.backward(grad_out.contiguous(), *parts, out, logsumexp, samples, rooms)
        for i, (grad, view) in enumerate(zip(grads, views, strict=True)):
            if angles is not None and i < 2:
                _rotate(grad[..., :head_dim], angles, view, back=True)
            elif grad is not view:
                view.copy_(grad[..., :head_dim])
        return grad_qkv

    def rotary_attention_fwd(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *settings
    ) -> tuple[Tensor, Tensor]:
        return self._attend("rotary_attention", qkv, (cos, sin, position_ids), *settings)

    def rotary_attention_bwd(
        self, grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor,
        cos: Tensor, sin: Tensor, position_ids: Tensor, *settings,
    ) -> Tensor:  # fmt: skip
        return self._attend_bwd(
            "rotary_attention", grad_out, qkv, out, logsumexp, (cos, sin, position_ids), *settings
        )

    def full_attention_fwd(
        self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int
    ) -> tuple[Tensor, Tensor]:
        return self._attend(
            "full_attention", qkv, None, cu_seqlens, max_seqlen, num_heads, num_heads, False
        )

    def full_attention_bwd(
        self, grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor,
        cu_seqlens: Tensor, max_seqlen: int, num_heads: int,
    ) -> Tensor:  # fmt: skip
        return self._attend_bwd(
            "full_attention", grad_out, qkv, out, logsumexp, None, cu_seqlens, max_seqlen,
            num_heads, num_heads, False,
        )  # fmt: skip

    @property
    def operations(self) -> tuple[Callable, Callable, Callable, Callable]:
        """In the order of reference.py: full forward and backward, rotary forward and backward."""
        return (
            self.full_attention_fwd,
            self.full_attention_bwd,
            self.rotary_attention_fwd,
            self.rotary_attention_bwd,
        )
