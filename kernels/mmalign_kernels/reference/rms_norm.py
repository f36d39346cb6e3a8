"""RMSNorm in plain PyTorch."""

import torch
from torch import Tensor

from ..operation import compute_dtype

aten = torch.ops.aten
_DWEIGHT_ROWS = 256  # rows per partial sum: dweight stays about as accurate as a pairwise sum


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    upcast = x.to(compute_dtype(x))
    norm = torch.linalg.vector_norm(upcast, dim=1, keepdim=True)
    rstd = norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    y = torch.mul(upcast, rstd, out=None if upcast is x else upcast)
    return y.mul_(weight).to(x.dtype), rstd


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = x.contiguous() + residual
    y, rstd = rms_norm_fwd(new_residual, weight, eps)
    return y, new_residual, rstd


def rms_norm_bwd(
    grad_y: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = rstd * (w*dy - xhat * mean(w*dy*xhat)), xhat = x * rstd.

    PyTorch fuses this into one pass, the backward of LayerNorm: with a mean of zero it returns
    dx - rstd * mean(w*dy), and dweight. One product with w restores the missing term.
    """
    upcast_weight = weight.to(rstd.dtype)
    zero = torch.zeros_like(rstd)
    rows = _DWEIGHT_ROWS if needs_weight else max(len(x), 1)
    grad_x = x.new_empty(x.shape)
    partial = rstd.new_zeros((len(x) + rows - 1) // rows if needs_weight else 0, x.shape[1])
    for i, begin in enumerate(range(0, len(x), rows)):
        part = slice(begin, begin + rows)
        grad = grad_y[part].to(rstd.dtype).contiguous()
        shift = torch.mv(grad, upcast_weight).unsqueeze_(1).mul_(rstd[part]).div_(x.shape[1])
        upcast = x[part].to(rstd.dtype).contiguous()
        dx, dweight, _ = aten.native_layer_norm_backward(
            grad, upcast, [x.shape[1]], zero[part], rstd[part], upcast_weight, None,
            [True, needs_weight, False],
        )  # fmt: skip
        if grad_residual is not None:
            dx.add_(grad_residual[part])
        torch.add(dx, shift, out=grad_x[part])
        if needs_weight:
            partial[i] = dweight
    return grad_x, partial.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)
