"""The language-model head in plain PyTorch: a few rows of logits at a time, never all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear import product
from .rms_norm import wide_type

IGNORE_INDEX = -100
_NUM_LOGITS = 1 << 22  # logits held at a time: 16 MB, which the allocator keeps for the next chunk


def _chunks(num_rows: int, vocab_size: int, at_least: int = 1) -> Iterator[slice]:
    rows = max(_NUM_LOGITS // vocab_size, at_least)
    return (slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows))


def _logits(hidden_states: Tensor, lm_head_weight: Tensor) -> Tensor:
    return product(hidden_states, lm_head_weight).to(wide_type(hidden_states))


def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, targets = hidden_states.index_select(0, rows), target_ids[rows].long().unsqueeze(1)
    wide = wide_type(hidden)
    loss = hidden.new_zeros((), dtype=wide)
    grad_rows = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = lm_head_weight.new_zeros(lm_head_weight.shape if needs_weight else 0, dtype=wide)
    # a sum over all of dweight ends each chunk: hold as many logits as dweight has numbers
    at_least = hidden.shape[1] if needs_weight else 1
    for part in _chunks(len(rows), len(lm_head_weight), at_least):
        logits = _logits(hidden[part], lm_head_weight)
        highest, chosen = logits.amax(1), logits.gather(1, targets[part])
        probs = torch.softmax(logits, 1, out=logits)
        # the highest probability is 1 / sum(exp(logits - highest))
        loss += (highest - probs.amax(1).log_()).sum() - chosen.sum()
        if not needs_hidden and not needs_weight:
            continue
        grad = probs.scatter_add_(1, targets[part], -torch.ones_like(chosen)).to(hidden.dtype)
        if needs_hidden:
            grad_rows[part] = product(grad, lm_head_weight.t())
        if needs_weight:
            grad_weight += product(grad.t(), hidden[part].t())
    if not needs_hidden:
        return loss, hidden.new_empty(0), grad_weight
    grad_hidden = hidden.new_zeros(hidden_states.shape)
    return loss, grad_hidden.index_copy_(0, rows, grad_rows), grad_weight


def linear_cross_entropy_bwd(
    grad_hidden: Tensor, grad_weight: Tensor, grad_loss: Tensor
) -> tuple[Tensor, Tensor]:
    return grad_hidden * grad_loss, (grad_weight * grad_loss).to(grad_hidden.dtype)


def target_logprobs_fwd(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, target_rows: Tensor | None
) -> Tensor:
    if target_rows is None:
        target_rows = torch.arange(len(target_ids), device=target_ids.device)
    sorted_rows, order = target_rows.sort()
    rows, owner = torch.unique_consecutive(sorted_rows, return_inverse=True)
    hidden, targets = hidden_states.index_select(0, rows), target_ids.index_select(0, order)
    logprobs = hidden.new_empty(len(order), dtype=wide_type(hidden))
    for part in _chunks(len(rows), len(lm_head_weight)):
        first, last = torch.searchsorted(owner, owner.new_tensor([part.start, part.stop])).tolist()
        logits = _logits(hidden[part], lm_head_weight)
        mine = owner[first:last] - part.start
        chosen, highest = logits[mine, targets[first:last]], logits.amax(1)
        log_sum = highest - torch.softmax(logits, 1, out=logits).amax(1).log_()
        torch.sub(chosen, log_sum[mine], out=logprobs[first:last])
    return torch.empty_like(logprobs).index_copy_(0, order, logprobs)


def target_logprobs_bwd(
    grad: Tensor,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    target_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if target_rows is None:
        target_rows = torch.arange(len(target_ids), device=target_ids.device)
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=grad.dtype)
    grad_weight = lm_head_weight.new_zeros(lm_head_weight.shape, dtype=grad.dtype)
    for part in _chunks(len(target_ids), len(lm_head_weight)):
        hidden = hidden_states.index_select(0, target_rows[part])
        scale, targets = grad[part, None], target_ids[part].long()[:, None]
        probs = torch.softmax(_logits(hidden, lm_head_weight), 1)
        grad_logits = probs.mul_(-scale).scatter_add_(1, targets, scale).to(hidden.dtype)
        grad_rows = product(grad_logits, lm_head_weight.t()).to(grad.dtype)
        grad_hidden.index_add_(0, target_rows[part], grad_rows)
        grad_weight += product(grad_logits.t(), hidden.t())
    return grad_hidden.to(hidden_states.dtype), grad_weight.to(lm_head_weight.dtype)
