"""The language-model head in plain PyTorch: a few rows of logits at a time, never all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rms_norm import wide_type

IGNORE_INDEX = -100
_NUM_LOGITS = 1 << 23  # logits held at a time


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    rows = max(_NUM_LOGITS // vocab_size, 1)
    return (slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows))


class _Logits:
    """Logits of a chunk of rows in one buffer that every chunk uses again."""

    def __init__(self, lm_head_weight: Tensor, num_rows: int):
        rows = next((s.stop for s in _chunks(num_rows, len(lm_head_weight))), 0)
        self.weight = lm_head_weight.t()
        self.buffer = lm_head_weight.new_empty(rows, len(lm_head_weight))
        wide = wide_type(lm_head_weight)
        same = wide == lm_head_weight.dtype
        self.wide = self.buffer if same else torch.empty_like(self.buffer, dtype=wide)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        logits = torch.mm(hidden_states, self.weight, out=self.buffer[: len(hidden_states)])
        wide = self.wide[: len(hidden_states)]
        return wide if wide.dtype == logits.dtype else wide.copy_(logits)


def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (target_ids != IGNORE_INDEX).nonzero().squeeze(1)
    hidden, targets = hidden_states.index_select(0, rows), target_ids[rows].long().unsqueeze(1)
    logits_of, wide = _Logits(lm_head_weight, len(rows)), wide_type(hidden)
    loss = hidden.new_zeros((), dtype=wide)
    grad_rows = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = lm_head_weight.new_zeros(lm_head_weight.shape if needs_weight else 0, dtype=wide)
    for part in _chunks(len(rows), len(lm_head_weight)):
        logprobs = logits_of(hidden[part])
        torch.log_softmax(logprobs, 1, out=logprobs)
        chosen = logprobs.gather(1, targets[part])
        loss -= chosen.sum()
        if not needs_hidden and not needs_weight:
            continue
        grad = logprobs.exp_().scatter_(1, targets[part], chosen.expm1_()).to(hidden.dtype)
        if needs_hidden:
            torch.mm(grad, lm_head_weight, out=grad_rows[part])
        if needs_weight and wide == hidden.dtype:
            grad_weight.addmm_(grad.t(), hidden[part])
        elif needs_weight:
            grad_weight += grad.t() @ hidden[part]
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
    logits_of = _Logits(lm_head_weight, len(rows))
    logprobs = hidden.new_empty(len(order), dtype=wide_type(hidden))
    for part in _chunks(len(rows), len(lm_head_weight)):
        first, last = torch.searchsorted(owner, owner.new_tensor([part.start, part.stop])).tolist()
        logits = logits_of(hidden[part])
        mine = owner[first:last] - part.start
        chosen = logits[mine, targets[first:last]]
        torch.sub(chosen, logits.logsumexp(1)[mine], out=logprobs[first:last])
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
    logits_of = _Logits(lm_head_weight, len(target_ids))
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=grad.dtype)
    grad_weight = lm_head_weight.new_zeros(lm_head_weight.shape, dtype=grad.dtype)
    for part in _chunks(len(target_ids), len(lm_head_weight)):
        hidden = hidden_states.index_select(0, target_rows[part])
        scale, targets = grad[part, None], target_ids[part].long()[:, None]
        grad_logits = torch.softmax(logits_of(hidden), 1).mul_(-scale)
        grad_logits.scatter_add_(1, targets, scale)
        grad_logits = grad_logits.to(hidden.dtype)
        grad_hidden.index_add_(0, target_rows[part], (grad_logits @ lm_head_weight).to(grad.dtype))
        grad_weight += grad_logits.t() @ hidden
    return grad_hidden.to(hidden_states.dtype), grad_weight.to(lm_head_weight.dtype)
