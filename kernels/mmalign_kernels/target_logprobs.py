"""Log-probabilities of target tokens, for scoring: log_softmax(h W^T)[target] in parts.

Plain PyTorch: reference/target_logprobs.py. Several targets may share a row (choices with one
context); each distinct row is multiplied by W once.
"""

from typing import Any

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
def target_logprobs_fwd(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, target_rows: Tensor | None
) -> Tensor:
    dtype = compute_dtype(hidden_states)
    return hidden_states.new_empty(target_ids.shape, dtype=dtype)


@operation
def target_logprobs_bwd(
    grad: Tensor,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden_states and lm_head_weight; the logits are recomputed."""
    return (
        hidden_states.new_empty(hidden_states.shape),
        lm_head_weight.new_empty(lm_head_weight.shape),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return *target_logprobs_bwd(grad, *ctx.saved_tensors), None, None


_target_logprobs = differentiable(target_logprobs_fwd, _save, _backward)


def target_logprobs(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor | None = None,
) -> Tensor:
    """log_softmax(hidden_states[target_rows[i]] @ lm_head_weight.T)[target_ids[i]] for every i.

    hidden_states (num_rows, hidden_size), lm_head_weight (vocab_size, hidden_size) of the same
    dtype, target_ids and target_rows (num_targets,); without target_rows, target i is read from
    row i -> (num_targets,) fp32. Rows without a target are not read. Raises ValueError where
    shapes, types or devices do not fit.
    """
    name = "target_logprobs"
    check_rank(name, 2, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    context = f"hidden_states {tuple(hidden_states.shape)}"
    vocab_size = lm_head_weight.shape[0]
    check_shape(name, (vocab_size, hidden_states.shape[1]), context, lm_head_weight=lm_head_weight)
    check_floats(name, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
    check_integers(name, hidden_states, target_ids=target_ids)
    if target_rows is None:
        check_shape(name, hidden_states.shape[:1], context, target_ids=target_ids)
    else:
        check_integers(name, hidden_states, target_rows=target_rows)
        context = f"target_ids {tuple(target_ids.shape)}"
        check_shape(name, target_ids.shape, context, target_rows=target_rows)
    return _target_logprobs(hidden_states, lm_head_weight, target_ids, target_rows)
