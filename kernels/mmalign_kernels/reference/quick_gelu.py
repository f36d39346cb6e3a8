"""Quick GELU in plain PyTorch."""

import torch
from torch import Tensor


def quick_gelu_fwd(x: Tensor) -> Tensor:
    return torch.mul(x.contiguous(), 1.702).sigmoid_().mul_(x)


def quick_gelu_bwd(grad_y: Tensor, x: Tensor) -> Tensor:
    gate = torch.mul(x.contiguous(), 1.702).sigmoid_()
    slope = (1 - gate).mul_(x).mul_(1.702).add_(1)
    return slope.mul_(gate).mul_(grad_y)
