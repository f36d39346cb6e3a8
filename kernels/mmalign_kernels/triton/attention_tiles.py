"""Assigns a tile of a sample to each attention program, computed on the device.

A sample of n tokens has ceil(n / BLOCK) tiles. The host does not know the lengths, so it launches
num_tokens // BLOCK + num_samples slots, at least as many as tiles and at most num_samples more; a
spare slot has length 0 and returns at once. A grid of (longest / BLOCK) * num_samples would be
mostly empty when lengths differ widely.

Tiles are ordered by work, most first, so that the last programs to finish are short: with a causal
mask tile i has i + 1 units of work, without one as many as its sample has tiles. The rank of a tile
is the number of tiles before it, counted over all samples: no sort, no atomics. Ties keep the order
of the samples.

Reads cu_seqlens once per sample, writes 16 bytes per slot. A program owns a sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_tables = WeakTensorKeyDictionary()  # cu_seqlens -> {version, num_tokens, block, causal: a table}


@triton.jit
def tile_at(tiles_ptr, num_slots, slot):
    """Index of the sample, its first row, its length, and the index of the tile in it."""
    sample = tl.load(tiles_ptr + slot)
    first_row = tl.load(tiles_ptr + num_slots + slot).to(tl.int64)
    length = tl.load(tiles_ptr + 2 * num_slots + slot)
    return sample, first_row, length, tl.load(tiles_ptr + 3 * num_slots + slot)


@triton.jit(do_not_specialize=["num_samples", "num_slots"])
def _attention_tiles_kernel(
    tiles_ptr,  # (4, num_slots) int32: sample, first row, length, tile
    cu_seqlens_ptr,
    num_samples,
    num_slots,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILES: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    sample = tl.program_id(0)
    first_row = tl.load(cu_seqlens_ptr + sample).to(tl.int32)
    length = tl.load(cu_seqlens_ptr + sample + 1).to(tl.int32) - first_row
    num_tiles = tl.cdiv(length, BLOCK)
    for first_tile in range(0, num_tiles, TILES):
        tile = first_tile + tl.arange(0, TILES)
        rank = tl.zeros((TILES,), tl.int32)
        for first_other in range(0, num_samples, SAMPLES):
            other, counts = _tiles_of(cu_seqlens_ptr, first_other, num_samples, BLOCK, SAMPLES)
            earlier = (other < sample)[None, :]
            if CAUSAL:
                more_work = tl.maximum(counts[None, :] - tile[:, None] - 1, 0)
                before = more_work + (earlier & (counts[None, :] > tile[:, None])).to(tl.int32)
            else:
                ahead = (counts[None, :] > num_tiles) | (earlier & (counts[None, :] == num_tiles))
                before = tl.where(ahead & (tile[:, None] >= 0), counts[None, :], 0)
            rank += tl.sum(before, 1)
        slot = rank if CAUSAL else rank + tile
        owned = tile < num_tiles
        tl.store(tiles_ptr + slot, sample, mask=owned)
        tl.store(tiles_ptr + num_slots + slot, first_row, mask=owned)
        tl.store(tiles_ptr + 2 * num_slots + slot, length, mask=owned)
        tl.store(tiles_ptr + 3 * num_slots + slot, tile, mask=owned)

    spare = sample  # at most one spare slot per sample
    for first_other in range(0, num_samples, SAMPLES):
        _, counts = _tiles_of(cu_seqlens_ptr, first_other, num_samples, BLOCK, SAMPLES)
        spare += tl.sum(counts, 0)
    for plane in tl.static_range(4):
        tl.store(tiles_ptr + plane * num_slots + spare, 0, mask=spare < num_slots)


@triton.jit
def _tiles_of(
    cu_seqlens_ptr, first_sample, num_samples, BLOCK: tl.constexpr, SAMPLES: tl.constexpr
):
    sample = first_sample + tl.arange(0, SAMPLES)
    known = sample < num_samples
    begin = tl.load(cu_seqlens_ptr + sample, mask=known, other=0).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + sample + 1, mask=known, other=0).to(tl.int32)
    return sample, tl.cdiv(end - begin, BLOCK)


def attention_tiles(cu_seqlens: Tensor, num_tokens: int, block: int, causal: bool) -> Tensor:
    """(4, num_slots) int32: sample, its first row, its length (0: nothing to do), the tile.

    All layers of a batch share a table: it is made once for each value of the tensor cu_seqlens.
    """
    captured = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or cu_seqlens.is_inference():  # a change of its value would not be seen
        return _attention_tiles(cu_seqlens, num_tokens, block, causal)
    tables = _tables.setdefault(cu_seqlens, {})
    wanted = cu_seqlens._version, num_tokens, block, causal
    if wanted not in tables:
        tables[wanted] = _attention_tiles(cu_seqlens, num_tokens, block, causal)
    return tables[wanted]


def _attention_tiles(cu_seqlens: Tensor, num_tokens: int, block: int, causal: bool) -> Tensor:
    num_samples = len(cu_seqlens) - 1
    num_slots = num_tokens // block + num_samples
    tiles = torch.empty((4, num_slots), dtype=torch.int32, device=cu_seqlens.device)
    if num_slots:
        _attention_tiles_kernel[(num_samples,)](
            tiles, cu_seqlens, num_samples, num_slots, block, causal, TILES=16, SAMPLES=64
        )
    return tiles
