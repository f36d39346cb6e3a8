"""Samples share a row of tokens: which ones (micro_batches), and the row itself (pack_samples)."""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import torch

from mmalign.batch import IGNORE_INDEX, PackedBatch
from mmalign.data.dataset import EncodedSample
from mmalign.errors import UserError
from mmalign.model.tiles import NEWLINE, Pixels, Tiles, join_pixels


def micro_batches(
    lengths: Sequence[int],
    micro_batch_tokens: int,
    world_size: int,
    costs: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Split a step into micro-batches of balanced cost, so that the ranks finish together.

    Longest-processing-time-first (LPT) scheduling under a limit of tokens, then the micro-batches
    in snake order over the ranks.

    Args:
        lengths: tokens of each sample of the step.
        costs: of each sample, in any unit; None: its tokens.
    Returns:
        For each rank its micro-batches, each the ascending indices of its samples. No micro-batch
        is empty or has more than micro_batch_tokens; every rank has the same number of them.
    Raises:
        UserError: no split of this kind was found.
    """
    lengths = [int(length) for length in lengths]
    costs = lengths if costs is None else list(costs)
    if len(lengths) < world_size:
        raise UserError(
            f"a global batch of {len(lengths)} samples cannot feed {world_size} processes. "
            "Raise --global-batch-size or start fewer processes"
        )
    fewest = max(1, math.ceil(sum(lengths) / micro_batch_tokens / world_size))
    for per_rank in range(fewest, len(lengths) // world_size + 1):
        bins = _balanced_bins(lengths, costs, micro_batch_tokens, per_rank * world_size)
        if bins is not None:
            return _assign_to_ranks(bins, world_size)
    raise UserError(
        f"{len(lengths)} samples with {sum(lengths)} tokens do not fit into micro-batches of at "
        f"most {micro_batch_tokens} tokens, the same number in each of {world_size} processes. "
        "Raise --micro-batch-tokens, or make --global-batch-size a multiple of the process count"
    )


def _balanced_bins(
    lengths: list[int], costs: list[int], most_tokens: int, num_bins: int
) -> list[tuple[int, list[int]]] | None:
    """(cost, indices) per bin: most expensive sample first, into the cheapest bin that it fits."""
    bins = [(0, i, 0, []) for i in range(num_bins)]  # (cost, tie-breaker, tokens, indices)
    for index in sorted(range(len(lengths)), key=lambda i: (-costs[i], -lengths[i], i)):
        full = []
        while bins and bins[0][2] + lengths[index] > most_tokens:
            full.append(heapq.heappop(bins))
        if not bins:
            return None
        cost, i, tokens, indices = bins[0]
        grown = (cost + costs[index], i, tokens + lengths[index], [*indices, index])
        heapq.heapreplace(bins, grown)
        for item in full:
            heapq.heappush(bins, item)
    return [(cost, sorted(indices)) for cost, _, _, indices in bins]


def _assign_to_ranks(bins: list[tuple[int, list[int]]], world_size: int) -> list[list[list[int]]]:
    """Most expensive bins first, in a snake order over the ranks: 0 1 2, 2 1 0, 0 1 2, ..."""
    bins = sorted(bins, key=lambda item: (-item[0], item[1]))
    ranks = [[] for _ in range(world_size)]
    for i, (_, indices) in enumerate(bins):
        row, column = divmod(i, world_size)
        ranks[column if row % 2 == 0 else world_size - 1 - column].append(indices)
    return ranks


def pack_samples(
    encoded: Sequence[EncodedSample],
    pixels: Sequence[Pixels | None],
    image_token_id: int,
    prefix_length: int = 0,
) -> PackedBatch:
    """Concatenate samples in one row.

    Args:
        encoded: ids and unshifted labels, images already expanded to their patches.
        pixels: for each sample its images, uint8 (num_images, 3, crop_size, crop_size), or their
            tiles, or None.
        image_token_id: marks the rows of image patches, and between lines of tiles.
        prefix_length: tokens of the shared prompt header, which get no rows and have no targets.
    """
    lengths = np.array([len(sample.input_ids) - prefix_length for sample in encoded])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])  # (num_samples + 1,)
    input_ids = np.concatenate([sample.input_ids[prefix_length:] for sample in encoded])
    input_ids = input_ids.astype(np.int64)
    labels = np.concatenate([sample.labels[prefix_length:] for sample in encoded])
    target_ids = np.full_like(input_ids, IGNORE_INDEX)
    target_ids[:-1] = labels[1:]
    target_ids[cu_seqlens[1:] - 1] = IGNORE_INDEX  # never the first token of the next sample
    position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1] - prefix_length, lengths)
    image_positions = torch.from_numpy(np.flatnonzero(input_ids == image_token_id))
    pixel_values, patch_rows = torch.empty((0, 3, 0, 0), dtype=torch.uint8), None
    if images := [x for x in pixels if x is not None]:
        pixel_values = join_pixels(images)
    if isinstance(pixel_values, Tiles):
        rows, pixel_values = pixel_values.rows, pixel_values.pixels
        assert len(rows) == len(image_positions)
        image_positions, patch_rows = image_positions[rows != NEWLINE], rows[rows != NEWLINE]
    assert len(pixel_values) == sum(sample.num_tiles for sample in encoded)
    assert patch_rows is not None or len(image_positions) % max(1, len(pixel_values)) == 0
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(target_ids),
        position_ids=torch.from_numpy(position_ids.astype(np.int32)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_loss_tokens=int((target_ids != IGNORE_INDEX).sum()),
        pixel_values=pixel_values,
        image_positions=image_positions,
        prefix_length=prefix_length,
        patch_rows=patch_rows,
    )
