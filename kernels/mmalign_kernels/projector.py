"""Projector and first RMSNorm in one operation. Plain PyTorch: reference/projector.py.

The matrix product of the image features writes each row at its position in the packed sequence;
text rows keep their embedding; all rows are also RMS-normalised for the first decoder layer. Saved
for the backward pass: the image features, the new hidden states and rstd.
"""

from typing import Any

from torch import Tensor

from .operation import (
    check_floats,
    check_integers,
    check_rank,
    check_shape,
    differentiable,
    empty_statistics,
    operation,
)


@operation
def project_image_features_fwd(
    image_features: Tensor, weight: Tensor, bias: Tensor, hidden_states: Tensor,
    image_positions: Tensor, norm_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """New hidden states, their normalised rows, and rstd (total_tokens, 1)."""
    shape = hidden_states.shape
    return (
        hidden_states.new_empty(shape),
        hidden_states.new_empty(shape),
        empty_statistics(hidden_states),
    )


@operation
def project_image_features_bwd(
    image_features: Tensor, weight: Tensor, hidden_states: Tensor, image_positions: Tensor,
    norm_weight: Tensor, rstd: Tensor, grad_hidden: Tensor | None, grad_normed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of image_features, weight, bias, hidden_states, norm_weight; empty if not needed.

    hidden_states: the result of the forward pass; needs: one flag per gradient.
    """
    shapes = (
        image_features.shape,
        weight.shape,
        weight.shape[:1],
        hidden_states.shape,
        norm_weight.shape,
    )
    features, weight, bias, hidden, norm = (
        weight.new_empty(shape if needed else 0)
        for shape, needed in zip(shapes, needs, strict=True)
    )
    return features, weight, bias, hidden, norm


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    image_features, weight, _, _, image_positions, norm_weight, _ = inputs
    hidden_states, _, rstd = output
    ctx.save_for_backward(image_features, weight, hidden_states, image_positions, norm_weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_hidden: Tensor | None, grad_normed: Tensor | None, _: None) -> tuple:
    if grad_hidden is None and grad_normed is None:
        return (None,) * 7
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    grads = project_image_features_bwd(*ctx.saved_tensors, grad_hidden, grad_normed, needs)
    grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return *grads[:4], None, grads[4], None


_project_image_features = differentiable(project_image_features_fwd, _save, _backward)


def project_image_features(
    image_features: Tensor, weight: Tensor, bias: Tensor, hidden_states: Tensor,
    image_positions: Tensor, norm_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden_states with rows image_positions replaced by image_features @ weight.T + bias; and
    rms_norm of all its rows.

    image_features (num_images * num_patches, vision_hidden_size), weight (hidden_size,
    vision_hidden_size), bias and norm_weight (hidden_size,), hidden_states (total_tokens,
    hidden_size) with the text embeddings, image_positions (num_images * num_patches,) without
    repetition -> two tensors like hidden_states. Both image arguments may be empty: then weight
    and bias still get a gradient, of zeros. Raises ValueError where shapes, types or devices do
    not fit.
    """
    name = "project_image_features"
    check_rank(name, 2, image_features=image_features, hidden_states=hidden_states)
    hidden_size = hidden_states.shape[1]
    context = f"image_features {tuple(image_features.shape)}, hidden {tuple(hidden_states.shape)}"
    check_shape(name, (hidden_size, image_features.shape[1]), context, weight=weight)
    check_shape(name, (hidden_size,), context, bias=bias, norm_weight=norm_weight)
    check_shape(name, image_features.shape[:1], context, image_positions=image_positions)
    check_floats(
        name,
        hidden_states=hidden_states,
        image_features=image_features,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
    )
    check_integers(name, hidden_states, image_positions=image_positions)
    hidden_states, normed, _ = _project_image_features(
        image_features, weight, bias, hidden_states, image_positions, norm_weight, eps
    )
    return hidden_states, normed
