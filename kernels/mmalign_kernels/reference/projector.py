"""Projector and first RMSNorm in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import product, weight_gradient
from .rms_norm import rms_norm_bwd, rms_norm_fwd


def project_image_features_fwd(
    image_features: Tensor, weight: Tensor, bias: Tensor, hidden_states: Tensor,
    image_positions: Tensor, norm_weight: Tensor, eps: float,
    rms_norm_fwd: Callable = rms_norm_fwd,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    projected = product(image_features, weight, bias)
    new_hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
    new_hidden_states.index_copy_(0, image_positions.long(), projected)
    return new_hidden_states, *rms_norm_fwd(new_hidden_states, norm_weight, eps)


def project_image_features_bwd(
    image_features: Tensor, weight: Tensor, hidden_states: Tensor, image_positions: Tensor,
    norm_weight: Tensor, rstd: Tensor, grad_hidden: Tensor | None, grad_normed: Tensor | None,
    needs: list[bool], rms_norm_bwd: Callable = rms_norm_bwd,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needs_features, needs_weight, needs_bias, needs_hidden, needs_norm = needs
    rows = image_positions.long()
    everywhere = needs_hidden or needs_norm  # otherwise only image rows need a gradient

    def pick(x: Tensor) -> Tensor:
        return x if everywhere else x.index_select(0, rows)

    grad = None if grad_hidden is None else pick(grad_hidden)
    dnorm = norm_weight.new_zeros(norm_weight.shape if needs_norm else 0)
    if grad_normed is not None:
        grad, dnorm = rms_norm_bwd(
            pick(grad_normed), grad, pick(hidden_states), norm_weight, pick(rstd), needs_norm
        )
    assert grad is not None, "one of the two results has a gradient"
    grad_image = grad.index_select(0, rows) if everywhere else grad
    return (
        product(grad_image, weight.t()) if needs_features else weight.new_empty(0),
        weight_gradient(grad_image, image_features) if needs_weight else weight.new_empty(0),
        grad_image.sum(0) if needs_bias else weight.new_empty(0),
        grad.index_fill(0, rows, 0) if needs_hidden else weight.new_empty(0),
        dnorm,
    )
