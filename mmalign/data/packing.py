"""Samples one after the other in one row of tokens: how a PackedBatch is made."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.data.dataset import EncodedSample


def pack_samples(
    encoded: Sequence[EncodedSample],
    pixels: Sequence[Tensor | None],
    image_token_id: int,
    prefix_length: int = 0,
) -> PackedBatch:
    """Put samples one after the other in one row.

    Args:
        encoded: ids and unshifted labels, the image already expanded to its patches.
        pixels: for each sample its image, uint8 (3, image_size, image_size), or None.
        image_token_id: marks the rows that image patches fill.
        prefix_length: leave out so many tokens at the start of every sample, none with a target.
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
    image_positions = np.flatnonzero(input_ids == image_token_id)
    assert len(images) == sum(sample.image is not None for sample in encoded)
    assert len(image_positions) % max(1, len(images)) == 0
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
    )
