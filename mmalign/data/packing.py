"""PackedBatch: samples of any length in one row of tokens, told apart by cu_seqlens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmalign.data.dataset import EncodedSample
    from mmalign.data.feature_cache import Uncached

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
    prefix_length: int = 0  # tokens before every sample that have no rows; position_ids count them
    # with a cache of the tower's outputs those that it has, (num_cached, num_patches, hidden_size);
    # pixel_values are then of the other images, whose places among all are the keys of `uncached`
    image_features: Tensor | None = None
    uncached: "dict[int, Uncached]" = field(default_factory=dict)


def pack_samples(
    encoded: "Sequence[EncodedSample]",
    pixels: Sequence[Tensor | None],
    image_token_id: int,
    prefix_length: int = 0,
    features: "Sequence[Tensor | Uncached | None] | None" = None,
) -> PackedBatch:
    """Put samples one after the other in one row.

    Args:
        encoded: ids and unshifted labels, the image already expanded to its patches.
        pixels: for each sample its image, uint8 (3, image_size, image_size), or None.
        image_token_id: marks the rows that image patches fill.
        prefix_length: leave out so many tokens at the start of every sample, none with a target.
        features: for each sample what FeatureCache.look_up gave of its image; its pixels are left
            out where these are features. Without a cache None.
    """
    lengths = np.array([len(sample.input_ids) - prefix_length for sample in encoded])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])  # (num_samples + 1,)
    input_ids = np.concatenate([sample.input_ids[prefix_length:] for sample in encoded])
    input_ids = input_ids.astype(np.int64)
    labels = np.concatenate([sample.labels[prefix_length:] for sample in encoded])
    target_ids = np.full_like(input_ids, IGNORE_INDEX)
    target_ids[:-1] = labels[1:]
    target_ids[cu_seqlens[1:] - 1] = IGNORE_INDEX  # no sample predicts the next one's first token
    position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1] - prefix_length, lengths)
    images = [image for image in pixels if image is not None]
    looked_up = [x for x in features or () if x is not None]
    cached = [x for x in looked_up if isinstance(x, Tensor)]
    image_positions = np.flatnonzero(input_ids == image_token_id)
    num_images = len(images) + len(cached)
    assert num_images == sum(sample.image is not None for sample in encoded)
    num_patches = len(image_positions) // max(1, num_images)
    assert num_patches * num_images == len(image_positions)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(target_ids),
        position_ids=torch.from_numpy(position_ids.astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_loss_tokens=int((target_ids != IGNORE_INDEX).sum()),
        pixel_values=torch.stack(images)
        if images
        else torch.empty((0, 3, 0, 0), dtype=torch.uint8),
        image_positions=torch.from_numpy(image_positions),
        prefix_length=prefix_length,
        image_features=None if features is None else _stacked(cached),
        uncached={i: x for i, x in enumerate(looked_up) if not isinstance(x, Tensor)},
    )


def _stacked(features: list[Tensor]) -> Tensor:
    return torch.stack(features) if features else torch.empty(0)
