"""What a training step can leave out and still give the same loss and gradients, to rounding.

Rows without a target (IGNORE_INDEX). After the last decoder layer nothing reads them, so there they
need keys and values alone: their queries, output projection and MLP are never computed, nor the
backward pass of these. Their attention is: it runs on all rows, with queries of zero, as every
attention backend takes it. With LLaMA2-7B, of a step's FLOPs, output projection and MLP are 2.11%
in stage 1 (300 tokens, 22 with a target) and 1.28% in stage 2 (550 and 242), the queries 0.23% and
0.14%, the attention that is left 0.03% and 0.02%: not worth an attention of some rows only.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmalign.data.packing import PackedBatch


def loss_rows(batch: "PackedBatch") -> Tensor:
    """The rows that have a target, rising: (num_loss_tokens,) int64, without waiting for a GPU."""
    return torch.nonzero_static(batch.target_ids >= 0, size=batch.num_loss_tokens).squeeze(1)
