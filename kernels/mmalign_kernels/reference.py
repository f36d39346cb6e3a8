"""Every operation in plain PyTorch: the meaning of the others, and the fast path on a CPU.

Half precisions are widened to fp32 where a sum runs over a row. On a CPU a step of training waits
for memory, so these functions touch it as seldom as PyTorch's own kernels allow: few passes,
results written in place, nothing materialised that a pass can avoid. On a GPU, attention, AdamW's
random rounding and the choice of supervised rows wait for the device; other backends do not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import product
from .reference_adamw import adamw_update
from .reference_attention import (
    full_attention_bwd,
    full_attention_fwd,
    rotary_attention_bwd,
    rotary_attention_fwd,
)
from .reference_attention_prefix import prefix_attention_update
from .reference_head import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    target_logprobs_bwd,
    target_logprobs_fwd,
)
from .reference_rotation import rotate_heads
from .reference_shared_prefix import shared_prefix_attention_bwd, shared_prefix_attention_fwd
from .rms_norm import wide_type

__all__ = [
    "adamw_update",
    "full_attention_bwd",
    "full_attention_fwd",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "prefix_attention_update",
    "rotary_attention_bwd",
    "rotary_attention_fwd",
    "rotate_heads",
    "shared_prefix_attention_bwd",
    "shared_prefix_attention_fwd",
    "target_logprobs_bwd",
    "target_logprobs_fwd",
]

aten = torch.ops.aten

_CACHED_ELEMENTS = 1 << 18  # of each of the five matrices that SwiGLU's gradient works on
_DWEIGHT_ROWS = 256  # rows in a partial sum: dweight stays about as exact as a pairwise sum

# RMSNorm


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    wide = x.to(wide_type(x))
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    rstd = norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    y = torch.mul(wide, rstd, out=None if wide is x else wide)
    return y.mul_(weight).to(x.dtype), rstd


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = x.contiguous() + residual
    y, rstd = rms_norm_fwd(new_residual, weight, eps)
    return y, new_residual, rstd


def rms_norm_bwd(
    grad_y: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx = rstd * (w*dy - xhat * mean(w*dy*xhat)), xhat = x * rstd.

    PyTorch has one fused pass for this, the backward of LayerNorm: with a mean of zero it gives
    dx - rstd * mean(w*dy), and dweight. One product with w gives back the missing term.
    """
    wide_weight = weight.to(rstd.dtype)
    zero = torch.zeros_like(rstd)
    rows = _DWEIGHT_ROWS if needs_weight else max(len(x), 1)
    grad_x = x.new_empty(x.shape)
    partial = rstd.new_zeros((len(x) + rows - 1) // rows if needs_weight else 0, x.shape[1])
    for i, begin in enumerate(range(0, len(x), rows)):
        part = slice(begin, begin + rows)
        grad = grad_y[part].to(rstd.dtype).contiguous()
        shift = torch.mv(grad, wide_weight).unsqueeze_(1).mul_(rstd[part]).div_(x.shape[1])
        wide = x[part].to(rstd.dtype).contiguous()
        dx, dweight, _ = aten.native_layer_norm_backward(
            grad, wide, [x.shape[1]], zero[part], rstd[part], wide_weight, None,
            [True, needs_weight, False],
        )  # fmt: skip
        if grad_residual is not None:
            dx.add_(grad_residual[part])
        torch.add(dx, shift, out=grad_x[part])
        if needs_weight:
            partial[i] = dweight
    return grad_x, partial.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)


# projector


def project_image_features_fwd(
    image_features: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    projected = product(image_features, weight, bias)
    new_hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
    new_hidden_states.index_copy_(0, image_positions.long(), projected)
    return new_hidden_states, *rms_norm_fwd(new_hidden_states, norm_weight, eps)


def project_image_features_bwd(
    image_features: Tensor,
    weight: Tensor,
    hidden_states: Tensor,
    image_positions: Tensor,
    norm_weight: Tensor,
    rstd: Tensor,
    grad_hidden: Tensor | None,
    grad_normed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_features, needs_weight, needs_bias, needs_hidden, needs_norm = needs
    rows = image_positions.long()
    everywhere = needs_hidden or needs_norm  # otherwise only the image rows' gradient is wanted

    def pick(x: Tensor | None) -> Tensor | None:
        return x if x is None or everywhere else x.index_select(0, rows)

    grad, dnorm = pick(grad_hidden), norm_weight.new_zeros(norm_weight.shape if needs_norm else 0)
    if grad_normed is not None:
        grad, dnorm = rms_norm_bwd(
            pick(grad_normed), grad, pick(hidden_states), norm_weight, pick(rstd), needs_norm
        )
    grad_image = grad.index_select(0, rows) if everywhere else grad
    return (
        product(grad_image, weight.t()) if needs_features else weight.new_empty(0),
        product(grad_image.t(), image_features.t()) if needs_weight else weight.new_empty(0),
        grad_image.sum(0) if needs_bias else weight.new_empty(0),
        grad.index_fill(0, rows, 0) if needs_hidden else weight.new_empty(0),
        dnorm,
    )


# SwiGLU


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    y = gate_up.new_empty(gate.shape)
    return aten.silu.out(gate, out=y).mul_(up)


def swiglu_bwd(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    grad = gate_up.new_empty(gate_up.shape)
    grad_gate, grad_up = grad.chunk(2, 1)
    torch.mul(grad_y, up, out=grad_up)  # room to spare for an intermediate
    aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
    aten.silu.out(gate, out=grad_up).mul_(grad_y)
    return grad


def swiglu_bwd_in_place(grad_y: Tensor, gate_up: Tensor) -> None:
    """Some rows at a time: what the passes share stays in the cache, and no new page is touched."""
    rows = max(_CACHED_ELEMENTS // max(grad_y.shape[1], 1), 1)
    for part, dy in zip(gate_up.split(rows), grad_y.split(rows), strict=True):
        gate, up = part.chunk(2, 1)
        grad_up = aten.silu(gate).mul_(dy)
        aten.silu_backward.grad_input(up.mul_(dy), gate, grad_input=gate)
        up.copy_(grad_up)


# rows


def pack_rows_fwd(x: Tensor, positions: Tensor) -> Tensor:
    return x.index_select(0, positions)


def pack_rows_bwd(grad: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    return grad.new_zeros(num_rows, *grad.shape[1:]).index_add_(0, positions, grad)


def unpack_rows_fwd(packed: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    zeros = packed.new_zeros(num_rows, *packed.shape[1:])
    return zeros.index_copy_(0, positions.long(), packed)


def unpack_rows_bwd(grad: Tensor, positions: Tensor) -> Tensor:
    return grad.index_select(0, positions)


# the CLIP tower


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.contiguous(), x.shape[1:], weight, bias, eps)


def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_type(x)
    grad, centred = grad_y.to(wide).contiguous(), x.to(wide) - x.mean(1, keepdim=True, dtype=wide)
    rstd = centred.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    normed = centred.mul_(rstd)
    grad_normed = grad * weight
    along = (grad_normed * normed).mean(1, keepdim=True)
    grad_x = (grad_normed - grad_normed.mean(1, keepdim=True)).addcmul_(normed, along, value=-1)
    grad_weight, grad_bias = (grad * normed).sum(0), grad.sum(0)
    return (
        grad_x.mul_(rstd).to(x.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def quick_gelu_fwd(x: Tensor) -> Tensor:
    return torch.mul(x.contiguous(), 1.702).sigmoid_().mul_(x)


def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    gate = torch.mul(x.contiguous(), 1.702).sigmoid_()
    slope = (1 - gate).mul_(x).mul_(1.702).add_(1)
    return slope.mul_(gate).mul_(grad_y)
