"""PackedBatch: samples of any length in one row of tokens, separated by cu_seqlens.

The contract between data, which packs it (data/packing.py), and the model, which reads it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100  # target of a token without a loss


@dataclass(frozen=True)
class PackedBatch:
    """What the model sees of one micro-batch. No tensor has a padded dimension."""

    input_ids: Tensor  # (total_tokens,) int64; image positions hold image_token_id
    target_ids: Tensor  # (total_tokens,) int64; the next token, IGNORE_INDEX where there is no loss
    position_ids: Tensor  # (total_tokens,) int32; restarts at 0 in every sample
    cu_seqlens: Tensor  # (num_samples + 1,) int32; first 0, last total_tokens
    max_seqlen: int  # longest sample; a Python int, so no device sync
    num_loss_tokens: int  # target_ids != IGNORE_INDEX, counted on the CPU
    pixel_values: Tensor  # (num_images, 3, image_size, image_size) uint8; normalised on the device
    image_positions: Tensor  # (num_rows,) int64; rows of the sequence that patches fill
    prefix_length: int = 0  # tokens before every sample that have no rows; position_ids count them
    patch_rows: Tensor | None = None  # (num_rows,) int64; of the tower's output; None: all of them

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on `device`; copies from pinned memory do not block the host."""
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)
