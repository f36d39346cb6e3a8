"""What a training step can leave out and still give the same loss and gradients, to rounding.

Rows without a target (IGNORE_INDEX). After the last decoder layer nothing reads them, so there they
need keys and values alone: their queries, output projection and MLP are never computed, nor the
backward pass of these. Their attention is: it runs on all rows, with queries of zero, as every
attention backend takes it. With LLaMA2-7B, of a step's FLOPs, output projection and MLP are 2.11%
in stage 1 (300 tokens, 22 with a target) and 1.28% in stage 2 (550 and 242), the queries 0.23% and
0.14%, the attention that is left 0.03% and 0.02%: not worth an attention of some rows only.

Frozen prefix (stage 1). Tokens before the image, such as a template's header, meet frozen weights
and each other alone: in every sample and step they have the same keys and values, and no gradient
of theirs reaches the projector. So they leave the rows of all samples; their keys and values are
computed once a run. The prefix ends before <im_start>, whose embedding learns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.batch import PackedBatch
from mmalign.model.positions import CachedPositions, KeyValues

if TYPE_CHECKING:
    from mmalign.model.decoder import Decoder


def loss_rows(batch: PackedBatch) -> Tensor:
    """The rows that have a target, rising: (num_loss_tokens,) int64, without waiting for a GPU."""
    return torch.nonzero_static(batch.target_ids >= 0, size=batch.num_loss_tokens).squeeze(1)


@torch.no_grad()
def prefix_key_values(decoder: "Decoder", token_ids: Sequence[int]) -> tuple[KeyValues, ...]:
    """Keys (rotated) and values of tokens at the start of a sample, in each layer."""
    weight, length = decoder.embed_tokens.weight, len(token_ids)
    input_ids = torch.tensor(token_ids, device=weight.device)
    position_ids = torch.arange(length, dtype=torch.int32, device=weight.device)
    bounds = torch.tensor([0, length], dtype=torch.int32, device=weight.device)
    span = bounds[:1], bounds[1:], torch.tensor([0, 1], dtype=torch.int32, device=weight.device)
    rotation = (*decoder.rotary.up_to(length), position_ids, bounds, length)
    layers = tuple(KeyValues(decoder.config, length, weight) for _ in decoder.layers)
    decoder.extend(input_ids, [CachedPositions(*rotation, *span, cache) for cache in layers])
    return layers
