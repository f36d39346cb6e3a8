"""Cross entropy of the language-model head in plain PyTorch: a few rows of logits at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..operation import compute_dtype
from .linear import WeightGradient, product

IGNORE_INDEX = -100
LOGITS_PER_CHUNK = 1 << 22  # 16 MB, which the allocator keeps for the next chunk


def chunks(num_rows: int, vocab_size: int, at_least: int = 1) -> Iterator[slice]:
    """Slices of rows whose logits are LOGITS_PER_CHUNK, or of at_least rows."""
    rows = max(LOGITS_PER_CHUNK // vocab_size, at_least)
    return (slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows))


def logits_of(hidden_states: Tensor, lm_head_weight: Tensor) -> Tensor:
    """(num_rows, vocab_size) in the compute dtype."""
    return product(hidden_states, lm_head_weight).to(compute_dtype(hidden_states))


def cross_entropy(logits: Tensor, target_ids: Tensor, needs_gradient: bool) -> Tensor:
    """Sum of the losses, (); their gradient overwrites the logits (num_rows, vocab_size)."""
    targets = target_ids.unsqueeze(1)
    highest, chosen = logits.amax(1), logits.gather(1, targets)
    probs = torch.softmax(logits, 1, out=logits)
    # the largest probability is 1 / sum(exp(logits - highest))
    loss = (highest - probs.amax(1).log_()).sum() - chosen.sum()
    if needs_gradient:
        probs.scatter_add_(1, targets, -torch.ones_like(chosen))
    return loss


def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    cross_entropy: Callable[[Tensor, Tensor, bool], Tensor] = cross_entropy,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, targets = hidden_states.index_select(0, rows), target_ids[rows].long()
    dtype = compute_dtype(hidden)
    loss = hidden.new_zeros((), dtype=dtype)
    grad_rows = hidden.new_empty(hidden.shape if needs_hidden else 0)
    grad_weight = WeightGradient(lm_head_weight if needs_weight else hidden.new_empty(0), dtype)
    needs_gradient = needs_hidden or needs_weight
    # each chunk ends with a sum over dweight: hold at least as many logits as dweight has elements
    at_least = hidden.shape[1] if needs_weight else 1
    for part in chunks(len(rows), len(lm_head_weight), at_least):
        logits = logits_of(hidden[part], lm_head_weight)
        loss += cross_entropy(logits, targets[part], needs_gradient)
        grad = logits.to(hidden.dtype)
        if needs_hidden:
            grad_rows[part] = product(grad, lm_head_weight.t())
        if needs_weight:
            grad_weight.add(grad, hidden[part])
    if not needs_hidden:
        return loss, grad_rows, grad_weight.total()
    grad_hidden = hidden.new_zeros(hidden_states.shape)
    return loss, grad_hidden.index_copy_(0, rows, grad_rows), grad_weight.total()


def linear_cross_entropy_bwd(
    grad_hidden: Tensor, grad_weight: Tensor, grad_loss: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_hidden * grad_loss, (grad_weight * grad_loss).to(grad_hidden.dtype)
