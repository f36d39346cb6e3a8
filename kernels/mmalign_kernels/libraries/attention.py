"""Attention by a library: a (forward, backward) pair each, and the adapter that they share.

Our projection is flat; a library takes separate q, k and v of (total_tokens, heads, head_dim) whose
last dimension is contiguous and a multiple of 8. Other head_dims (100) are padded with zeros, which
change neither scores nor outputs. Queries and keys are rotated before, in a pass of our own, and
their gradients by the inverse rotation after. The pairs call the libraries below their autograd
functions, because the operations save the logsumexp themselves, and are deterministic where
torch.use_deterministic_algorithms is on.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import dispatch
from ..operation import empty_statistics
from . import check

aten = torch.ops.aten
_MULTIPLE = 8  # of 16-bit columns: 16 bytes
Gradients = tuple[Tensor, ...]  # dq, dk, dv


class Samples(NamedTuple):
    """The packing and the settings of one call."""

    cu_seqlens: Tensor  # int32
    max_seqlen: int
    causal: bool
    scale: float

    @property
    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """For functions that take those of queries and keys."""
        return self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen

    @property
    def keywords(self) -> dict[str, Any]:
        """The same by the names of FlashAttention-3 and -4."""
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        settings = {"softmax_scale": self.scale, "causal": self.causal}
        return dict(zip(names, self.offsets, strict=True)) | settings


# forward:  q, k, v, samples -> out like q, logsumexp (heads, total_tokens)
# backward: grad_out, q, k, v, out, logsumexp, samples, buffers -> dq, dk, dv; it may write them
#           into the three buffers


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 (package flash_attn, 2.7 or later): Dao 2023 (arXiv 2307.08691)."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, logsumexp, *_ = _flash_attn_varlen_forward(
        q, k, v, *samples.offsets, 0.0, samples.scale, samples.causal
    )
    return out, logsumexp


def _flash_attn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    samples: Samples, buffers: Gradients,
) -> Gradients:  # fmt: skip
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    _flash_attn_varlen_backward(
        *(grad_out, q, k, v, out, logsumexp, *buffers, *samples.offsets),
        *(0.0, samples.scale, samples.causal),
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return buffers


def _flash_attn_3_forward(
    q: Tensor, k: Tensor, v: Tensor, samples: Samples
) -> tuple[Tensor, Tensor]:
    """FlashAttention-3 (module flash_attn_interface): Shah et al. 2024 (arXiv 2407.08608)."""
    from flash_attn_interface import _flash_attn_forward

    out, logsumexp, *_ = _flash_attn_forward(q, k, v, **samples.keywords)
    return out, logsumexp


def _flash_attn_3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    samples: Samples, buffers: Gradients,
) -> Gradients:  # fmt: skip
    from flash_attn_interface import _flash_attn_backward

    _flash_attn_backward(
        *(grad_out, q, k, v, out, logsumexp, samples.cu_seqlens, samples.cu_seqlens, None, None),
        *(samples.max_seqlen, samples.max_seqlen, *buffers, samples.scale, samples.causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return buffers


def _flash_attn_4_forward(
    q: Tensor, k: Tensor, v: Tensor, samples: Samples
) -> tuple[Tensor, Tensor]:
    """FlashAttention-4 in CuTe DSL (package flash_attn_4, module flash_attn.cute); Hopper on."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, logsumexp, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **samples.keywords)
    return out, logsumexp


def _flash_attn_4_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    samples: Samples, _buffers: Gradients,
) -> Gradients:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad_out, logsumexp, deterministic=deterministic, **samples.keywords
    )
    return dq, dk, dv


_masks = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, the mask)


def _xformers_mask(samples: Samples) -> Any:
    """Needs the lengths on the host: synchronises once per cu_seqlens, not once per layer."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    cu_seqlens = samples.cu_seqlens
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _masks.get(cu_seqlens)
    if known is None or known[0] != version or version is None:
        lengths = cu_seqlens.diff().tolist()
        known = version, BlockDiagonalMask.from_seqlens(lengths, device=cu_seqlens.device)
        _masks[cu_seqlens] = known
    return known[1].make_causal() if samples.causal else known[1]


def _repeated(x: Tensor, num_heads: int) -> Tensor:
    """xformers' layout for grouped queries has no backward pass: repeat keys and values."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _summed(grad: Tensor, num_heads: int) -> Tensor:
    """(total_tokens, query heads, head_dim) -> (total_tokens, num_heads, head_dim)."""
    return grad if grad.shape[1] == num_heads else grad.unflatten(1, (num_heads, -1)).sum(2)


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """xformers' memory_efficient_attention, by the operator that it selects for the GPU."""
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    q, k, v = (_repeated(x, q.shape[1])[None] for x in (q, k, v))  # all samples in one batch
    out, logsumexp = memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=_xformers_mask(samples), scale=samples.scale
    )
    if logsumexp.shape[0] != 1 or logsumexp.shape[2] < q.shape[1]:
        raise NotImplementedError(
            "attention: backend xformers selected an operator that pads the logsumexp to "
            f"{tuple(logsumexp.shape)}; its FlashAttention operators are needed. "
            "python -m xformers.info lists the operators it has"
        )
    return out[0], logsumexp[0, :, : q.shape[1]]


def _xformers_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    samples: Samples, _buffers: Gradients,
) -> Gradients:  # fmt: skip
    from xformers.ops import memory_efficient_attention_backward

    grads = memory_efficient_attention_backward(
        grad_out[None],
        out[None],
        logsumexp[None],
        *(_repeated(x, q.shape[1])[None] for x in (q, k, v)),
        attn_bias=_xformers_mask(samples),
        scale=samples.scale,
    )
    return tuple(_summed(x[0], y.shape[1]) for x, y in zip(grads, (q, k, v), strict=True))


def _torch_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, samples: Samples
) -> tuple[Tensor, Tensor]:
    """PyTorch's own FlashAttention, CUDA only.

    The operators under torch.nn.attention.varlen.varlen_attn: its wrapper changed its signature
    from 2.10 to 2.13 (causal window, enable_gqa), these keep theirs.
    """
    out, logsumexp, *_ = aten._flash_attention_forward(
        q, k, v, *samples.offsets, 0.0, samples.causal, False, scale=samples.scale
    )
    return out, logsumexp


def _torch_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    samples: Samples, _buffers: Gradients,
) -> Gradients:  # fmt: skip
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    return aten._flash_attention_backward(
        *(grad_out, q, k, v, out, logsumexp, *samples.offsets, 0.0, samples.causal, rng_state),
        torch.empty(0, device=q.device),
        scale=samples.scale,
    )


PAIRS = {
    "flash_attn": (_flash_attn_forward, _flash_attn_backward),
    "flash_attn_3": (_flash_attn_3_forward, _flash_attn_3_backward),
    "flash_attn_4": (_flash_attn_4_forward, _flash_attn_4_backward),
    "xformers": (_xformers_forward, _xformers_backward),
    "torch_varlen": (_torch_varlen_forward, _torch_varlen_backward),
}


def _rotate(x: Tensor, angles: tuple, out: Tensor, inverse: bool) -> None:
    function = dispatch.implementation("rotate_heads", "rotation", x.device.type)
    function(x, *angles, out, inverse)


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


def _split(qkv: Tensor, angles: tuple | None, num_heads: int, num_kv_heads: int) -> Gradients:
    """q and k, rotated if there are angles, and v: (total_tokens, heads, padded head_dim)."""
    heads = qkv.contiguous().unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if angles is None:
        return (*(_padded(x) for x in qk.split((num_heads, num_kv_heads), 1)), _padded(v))
    head_dim = heads.shape[2]
    missing = -head_dim % _MULTIPLE
    new = qkv.new_zeros if missing else qkv.new_empty
    rotated = new((len(qkv), num_heads + num_kv_heads, head_dim + missing))
    _rotate(qk, angles, rotated[..., :head_dim], inverse=False)
    return (*rotated.split((num_heads, num_kv_heads), 1), _padded(v))


class LibraryAttention:
    """The four attention operations by one library."""

    def __init__(self, backend: str, forward: Callable, backward: Callable):
        self.backend, self.forward, self.backward = backend, forward, backward

    def operations(self) -> dict[str, Callable]:
        return {
            "full_attention_fwd": self.full_attention_fwd,
            "full_attention_bwd": self.full_attention_bwd,
            "rotary_attention_fwd": self.rotary_attention_fwd,
            "rotary_attention_bwd": self.rotary_attention_bwd,
        }

    def _attend(
        self, name: str, qkv: Tensor, angles: tuple | None, cu_seqlens: Tensor, max_seqlen: int,
        num_heads: int, num_kv_heads: int, causal: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        check(self.backend, name, qkv, head_dim)
        if not len(qkv):
            return qkv.new_empty(0, num_heads * head_dim), empty_statistics(qkv, num_heads)
        q, k, v = _split(qkv, angles, num_heads, num_kv_heads)
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
        qkv_heads = _split(qkv, angles, num_heads, num_kv_heads)
        grad_out, out = (_padded(x.unflatten(1, (num_heads, -1))) for x in (grad_out, out))
        samples = Samples(cu_seqlens.int(), max_seqlen, causal, head_dim**-0.5)
        logsumexp = logsumexp.t().contiguous()
        sizes = num_heads, num_kv_heads, num_kv_heads
        views = grad_qkv.unflatten(1, (sum(sizes), -1)).split(sizes, 1)
        buffers = views if head_dim % _MULTIPLE == 0 else tuple(map(torch.empty_like, qkv_heads))
        grads = self.backward(grad_out.contiguous(), *qkv_heads, out, logsumexp, samples, buffers)
        for i, (grad, view) in enumerate(zip(grads, views, strict=True)):
            if angles is not None and i < 2:
                _rotate(grad[..., :head_dim], angles, view, inverse=True)
            elif grad is not view:
                view.copy_(grad[..., :head_dim])
        return grad_qkv

    def rotary_attention_fwd(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        return self._attend("rotary_attention", qkv, (cos, sin, position_ids), *settings)

    def rotary_attention_bwd(
        self, grad_out: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor,
        cos: Tensor, sin: Tensor, position_ids: Tensor, *settings: Any,
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


OPERATIONS = {name: LibraryAttention(name, *pair).operations() for name, pair in PAIRS.items()}
