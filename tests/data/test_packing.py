"""Packing against samples taken one at a time."""

import numpy as np
import torch

from mmalign.batch import IGNORE_INDEX
from mmalign.data.dataset import EncodedSample
from mmalign.data.packing import pack_samples

IMAGE_ID, NUM_PATCHES = 99, 3


def random_sample(rng: np.random.Generator, length: int, image: bool) -> EncodedSample:
    ids = rng.integers(3, 90, length).astype(np.int32)
    # also the first label of a sample: nothing may predict it across the boundary
    labels = np.where(rng.random(length) < 0.5, ids, IGNORE_INDEX).astype(np.int32)
    if image:
        ids[2 : 2 + NUM_PATCHES], labels[2 : 2 + NUM_PATCHES] = IMAGE_ID, IGNORE_INDEX
    return EncodedSample("x", ids, labels, "image" if image else None)


def test_every_sample_is_found_again_in_the_batch():
    rng = np.random.default_rng(0)
    for lengths in ([7], [1], [5, 1, 9], [8, 6, 1, 1, 30]):
        samples = [random_sample(rng, n, image=n > 5) for n in lengths]
        pixels = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(len(samples))]
        pixels = [p if s.image else None for p, s in zip(pixels, samples, strict=True)]
        batch = pack_samples(samples, pixels, IMAGE_ID)
        assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
        assert batch.max_seqlen == max(lengths) and isinstance(batch.max_seqlen, int)
        images = 0
        for i, sample in enumerate(samples):
            begin, end = batch.cu_seqlens[i : i + 2].tolist()
            assert batch.input_ids[begin:end].tolist() == sample.input_ids.tolist()
            shifted = [*sample.labels[1:].tolist(), IGNORE_INDEX]  # as transformers shifts them
            assert batch.target_ids[begin:end].tolist() == shifted
            assert batch.position_ids[begin:end].tolist() == list(range(end - begin))
            if sample.image:
                places = batch.image_positions[images * NUM_PATCHES :][:NUM_PATCHES]
                assert places.tolist() == [begin + 2, begin + 3, begin + 4]
                assert batch.pixel_values[images].unique().tolist() == [i]
                images += 1
        assert len(batch.pixel_values) == images
        assert len(batch.image_positions) == images * NUM_PATCHES
        assert batch.num_loss_tokens == int((batch.target_ids != IGNORE_INDEX).sum())
        dtypes = (batch.input_ids.dtype, batch.target_ids.dtype, batch.image_positions.dtype)
        assert set(dtypes) == {torch.int64}
        assert batch.position_ids.dtype == batch.cu_seqlens.dtype == torch.int32
        assert batch.pixel_values.dtype == torch.uint8
