"""Micro-batches against their limits, and packing against samples taken one at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.batch import IGNORE_INDEX
from mmalign.data.dataset import EncodedSample
from mmalign.data.packing import micro_batches, pack_samples
from mmalign.errors import UserError

IMAGE_ID, NUM_PATCHES = 99, 3


def random_sample(rng: np.random.Generator, length: int, num_images: int) -> EncodedSample:
    """Every image after a token of text, and one text token at the end."""
    ids = rng.integers(3, 90, length).astype(np.int32)
    # also the first label of a sample: nothing may predict it across the boundary
    labels = np.where(rng.random(length) < 0.5, ids, IGNORE_INDEX).astype(np.int32)
    for place in starts(num_images):
        patches = slice(place, place + NUM_PATCHES)
        ids[patches], labels[patches] = IMAGE_ID, IGNORE_INDEX
    return EncodedSample("x", ids, labels, (Path("image"),) * num_images, num_images)


def starts(num_images: int) -> list[int]:
    return [2 + i * (NUM_PATCHES + 1) for i in range(num_images)]


def test_every_sample_is_found_again_in_the_batch():
    rng = np.random.default_rng(0)
    for lengths in ([7], [1], [5, 1, 9], [8, 6, 1, 1, 30]):
        counts = [n // 6 for n in lengths]
        samples = [random_sample(rng, *x) for x in zip(lengths, counts, strict=True)]
        # the images of a sample have its number and theirs as their levels
        numbers = [torch.arange(n, dtype=torch.uint8) + 10 * i for i, n in enumerate(counts)]
        pixels = [x.view(-1, 1, 1, 1).expand(-1, 3, 2, 2) if len(x) else None for x in numbers]
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
            for number, start in enumerate(starts(counts[i])):
                places = batch.image_positions[images * NUM_PATCHES :][:NUM_PATCHES]
                assert places.tolist() == [begin + start + j for j in range(NUM_PATCHES)]
                assert batch.pixel_values[images].unique().tolist() == [10 * i + number]
                images += 1
        assert len(batch.pixel_values) == images
        assert len(batch.image_positions) == images * NUM_PATCHES
        assert batch.num_loss_tokens == int((batch.target_ids != IGNORE_INDEX).sum())
        dtypes = (batch.input_ids.dtype, batch.target_ids.dtype, batch.image_positions.dtype)
        assert set(dtypes) == {torch.int64}
        assert batch.position_ids.dtype == batch.cu_seqlens.dtype == torch.int32
        assert batch.pixel_values.dtype == torch.uint8


# ---- micro-batches ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_micro_batches_hold_every_sample_once_under_the_limit(world_size):
    rng = np.random.default_rng(world_size)
    for _ in range(60):
        lengths = rng.integers(1, 500, world_size * int(rng.integers(1, 17))).tolist()
        limit = int(max(max(lengths), rng.integers(100, 4000)))
        ranks = micro_batches(lengths, limit, world_size)
        assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
        batches = [batch for rank in ranks for batch in rank]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        tokens = [sum(lengths[i] for i in batch) for batch in batches]
        assert min(tokens) > 0 and max(tokens) <= limit
        assert all(batch == sorted(batch) for batch in batches)
        assert micro_batches(lengths, limit, world_size) == ranks


def test_micro_batches_are_few_and_balanced():
    rng = np.random.default_rng(0)
    for world_size in (1, 4):
        lengths = rng.integers(280, 700, 128).tolist()  # a finetune mix with images
        ranks = micro_batches(lengths, 8192, world_size)
        tokens = [[sum(lengths[i] for i in batch) for batch in rank] for rank in ranks]
        everything = sum(map(sum, tokens))
        assert len(ranks[0]) <= -(-everything // (8192 * world_size)) + 1
        flat = sum(tokens, [])
        assert max(flat) - min(flat) < 0.05 * max(flat)
        per_rank = [sum(rank) for rank in tokens]
        assert max(per_rank) - min(per_rank) < 0.02 * max(per_rank)


def test_micro_batches_of_equal_cost():
    """With attention a token costs more in a longer sample: equal tokens are not equal time."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([40, 300, 900], 128, p=[0.5, 0.3, 0.2]).tolist()
    costs = [length * (1000 + length) for length in lengths]

    def spread(ranks: list[list[list[int]]]) -> float:
        shares = [sum(costs[i] for batch in rank for i in batch) for rank in ranks]
        return max(shares) / min(shares) - 1

    by_cost = micro_batches(lengths, 4096, 4, costs)
    assert spread(by_cost) < 0.02 < spread(micro_batches(lengths, 4096, 4))
    batches = [batch for rank in by_cost for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(128))
    assert max(sum(lengths[i] for i in batch) for batch in batches) <= 4096


def test_all_in_one_micro_batch_keeps_the_order():
    assert micro_batches([5, 9, 2], 100, 1) == [[[0, 1, 2]]]


def test_steps_that_cannot_be_split():
    with pytest.raises(UserError, match="2 samples cannot feed 3 processes"):
        micro_batches([5, 5], 100, 3)
    with pytest.raises(UserError, match="the same number in each of 2 processes"):
        micro_batches([90, 90, 90], 100, 2)
