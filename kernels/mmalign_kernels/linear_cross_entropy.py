"""Language-model head and cross entropy without ever holding the logits whole.

loss = sum over supervised rows of logsumexp(h W^T) - (h W^T)[target]. Only supervised rows touch W.
The gradients are formed in the forward pass, chunk by chunk, while the logits are at hand; the
backward pass scales them. dweight is summed in fp32 over the chunks.
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
    """loss_sum (), its gradient by hidden_states, and by lm_head_weight in fp32; empty if unneeded.

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


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
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


_linear_cross_entropy = differentiable(linear_cross_entropy_fwd, _keep, _backward)


def linear_cross_entropy(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor
) -> Tensor:
    """Sum of the cross entropy over the rows whose target is not -100 (IGNORE_INDEX).

    hidden_states (num_rows, hidden_size), lm_head_weight (vocab_size, hidden_size) of the same
    type, target_ids (num_rows,) int64 -> loss_sum (), fp32. Ignored rows are not read: whatever
    they hold, their gradient is zero. Raises ValueError where shapes, types or devices do not fit.
    """
    name = "linear_cross_entropy"
    check_rank(name, 2, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    beside = f"hidden_states {tuple(hidden_states.shape)}"
    vocab_size = lm_head_weight.shape[0]
    check_shape(name, (vocab_size, hidden_states.shape[1]), beside, lm_head_weight=lm_head_weight)
    check_shape(name, hidden_states.shape[:1], beside, target_ids=target_ids)
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
