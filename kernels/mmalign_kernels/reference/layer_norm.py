"""LayerNorm with bias in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..operation import compute_dtype


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.contiguous(), x.shape[1:], weight, bias, eps)


def layer_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    grad, centred = (
        grad_y.to(dtype).contiguous(),
        x.to(dtype) - x.mean(1, keepdim=True, dtype=dtype),
    )
    rstd = centred.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    normed = centred.mul_(rstd)
    grad_normed = grad * weight
    along = (grad_normed * normed).mean(1, keepdim=True)
    grad_x = (grad_normed - grad_normed.mean(1, keepdim=True)).addcmul_(normed, along, value=-1)
    grad_weight, grad_bias = (grad * normed).sum(0), grad.sum(0)
    return (grad_x.mul_(rstd).to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))
