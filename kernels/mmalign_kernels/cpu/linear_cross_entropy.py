"""Cross entropy of the language-model head; the logits' part by csrc/cpu/cross_entropy.cpp."""

import torch
from torch import Tensor

from ..reference import linear_cross_entropy as reference
from ..reference.linear_cross_entropy import linear_cross_entropy_bwd
from .library import operation

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd"]


def linear_cross_entropy_fwd(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = hidden_states.dtype == torch.float32
    return reference.linear_cross_entropy_fwd(
        *(hidden_states, lm_head_weight, target_ids, needs_hidden, needs_weight),
        cross_entropy=_cross_entropy if fp32 else reference.cross_entropy,
    )


def _cross_entropy(logits: Tensor, target_ids: Tensor, needs_gradient: bool) -> Tensor:
    return operation("cross_entropy")(logits.contiguous(), target_ids, needs_gradient).sum()
