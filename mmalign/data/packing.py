"""PackedBatch: samples of any length in one row of tokens, told apart by cu_seqlens."""

from dataclasses import dataclass

from torch import Tensor

IGNORE_INDEX = -100


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
    image_positions: Tensor  # (num_images * num_patches,) int64; rows of the sequence to fill
