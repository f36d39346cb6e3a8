"""Log-probabilities of chosen tokens in plain PyTorch: a few rows of logits at a time."""

import torch
from torch import Tensor

from ..operation import compute_dtype
from .linear import product
from .linear_cross_entropy import chunks, logits_of


def target_logprobs_fwd(
    hidden_states: Tensor, lm_head_weight: Tensor, target_ids: Tensor, target_rows: Tensor | None
) -> Tensor:
    if target_rows is None:
        target_rows = torch.arange(len(target_ids), device=target_ids.device)
    sorted_rows, order = target_rows.sort()
    rows, owner = torch.unique_consecutive(sorted_rows, return_inverse=True)
    hidden, targets = hidden_states.index_select(0, rows), target_ids.index_select(0, order)
    logprobs = hidden.new_empty(len(order), dtype=compute_dtype(hidden))
    for part in chunks(len(rows), len(lm_head_weight)):
        first, last = torch.searchsorted(owner, owner.new_tensor([part.start, part.stop])).tolist()
        logits = logits_of(hidden[part], lm_head_weight)
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
    for part in chunks(len(target_ids), len(lm_head_weight)):
        hidden = hidden_states.index_select(0, target_rows[part])
        scale, targets = grad[part, None], target_ids[part].long()[:, None]
        probs = torch.softmax(logits_of(hidden, lm_head_weight), 1)
        grad_logits = probs.mul_(-scale).scatter_add_(1, targets, scale).to(hidden.dtype)
        grad_rows = product(grad_logits, lm_head_weight.t()).to(grad.dtype)
        grad_hidden.index_add_(0, target_rows[part], grad_rows)
        grad_weight += product(grad_logits.t(), hidden.t())
    return grad_hidden.to(hidden_states.dtype), grad_weight.to(lm_head_weight.dtype)
