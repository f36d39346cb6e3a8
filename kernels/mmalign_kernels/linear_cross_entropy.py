"""Language-model head and cross entropy without materialising all logits.

loss = sum over supervised rows of logsumexp(h W^T) - (h W^T)[target]. Plain PyTorch:
reference/linear_cross_entropy.py. Only supervised rows are multiplied by W. The forward pass
computes the gradients, chunk by chunk, while it has the logits; the backward pass scales them.
dweight accumulates in fp32 over the chunks.
"""

from typing import Any

import torch
from torch import Tensor

from .operation import (
    check_floats,
    check_integers,
    check_rank,
    check_shape,
    compute_dtype,
    differentiable,
    operation,
)


@operation
def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_sum (), gradients by hidden_states and, in fp32, by lm_head_weight; empty if unneeded.

    Sums are fp32, or fp64 for fp64 input.
    """
    dtype = compute_dtype(hidden_states)
    loss = hidden_states.new_empty((), dtype=dtype)
    grad_hidden = hidden_states.new_empty(hidden_states.shape if needs_hidden else 0)
    shape = lm_head_weight.shape if needs_weight else 0
    return loss, grad_hidden, lm_head_weight.new_empty(shape, dtype=dtype)


@operation
def linear_cross_entropy_bwd(
    grad_hidden: Tensor, grad_weight: Tensor, grad_loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients times grad_loss (), the weight's in the type of the weight."""
    weight_like = grad_weight.new_empty(grad_weight.shape, dtype=grad_hidden.dtype)
    return grad_hidden.new_empty(grad_hidden.shape), weight_like


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[3:]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return (None,) * 5
    grads = linear_cross_entropy_bwd(*ctx.saved_tensors, grad_loss)
    hidden, weight = (grad if n else None for grad, n in zip(grads, ctx.needs, strict=True))
    return hidden, weight, None, None, None


_linear_cross_entropy = differentiable(linear_cross_entropy_fwd, _save, _backward)


def linear_cross_entropy(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor
) -> Tensor:
    """Sum of the cross entropy over the rows whose target is not -100 (IGNORE_INDEX).

    hidden_states (num_rows, hidden_size), lm_head_weight (vocab_size, hidden_size) of the same
    dtype, target_ids (num_rows,) int64 -> loss_sum (), fp32. Ignored rows are not read, and
    their gradient is zero. Raises ValueError if shapes, dtypes or devices do not match.
    """
    name = "linear_cross_entropy"
    check_rank(name, 2, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    context = f"hidden_states {tuple(hidden_states.shape)}"
    vocab_size = lm_head_weight.shape[0]
    check_shape(name, (vocab_size, hidden_states.shape[1]), context, lm_head_weight=lm_head_weight)
    check_shape(name, hidden_states.shape[:1], context, target_ids=target_ids)
    check_floats(name, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    check_integers(name, hidden_states, target_ids=target_ids)
    needs = torch.is_grad_enabled()
    return _linear_cross_entropy(
        hidden_states,
        lm_head_weight,
        target_ids,
        needs and hidden_states.requires_grad,
        needs and lm_head_weight.requires_grad,
    )[0]
