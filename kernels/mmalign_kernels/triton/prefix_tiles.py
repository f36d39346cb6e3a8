"""Tiles of prefix attention: rows that follow one another in a tree of prefixes, and their keys.

In depth-first order an ancestor of any later row is an ancestor of the next one. So of the rows
before a tile, its rows see no other than the path, which is what its first row sees; each sees a
beginning of it. A tile's keys are the path and its own rows, listed once for all of its rows,
whatever segments they belong to: on TruthfulQA's tree, whose segments have 7 tokens, a key is read
by 64 rows at once.

Segments join a tile where the spans say that they continue such an order: what a segment sees
before its own rows must be a beginning, not empty, of what the last row before it sees. Others
(samples in generation, each with a cache of its own) begin a new tile.

Computed on the host, in NumPy: 5 ms for 16,384 tokens, once for all layers. Imports no triton.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.prefix_attention import check_spans, ranges


class PrefixTiles(NamedTuple):
    block: int  # rows of a tile, at most
    slots: Tensor  # (num_tokens,) int32, cache row of each token
    tiles: Tensor  # (5, num_tiles) int32: first row, rows, first listed key, path, keys all see
    keys: Tensor  # (2, num_listed) int32: cache row; the tile's row from which on it is not seen


class _Segments(NamedTuple):
    bounds: np.ndarray  # (num_segments + 1,) rows
    firsts: np.ndarray  # (num_segments + 1,) spans
    begins: np.ndarray  # (num_spans,) cache rows
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    @property
    def own_begins(self) -> np.ndarray:
        """(num_segments,) cache row of each segment's first token."""
        return self.ends[self.firsts[1:] - 1] - self.lengths

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each span, the end of what the segment sees before its own rows; summed by segment."""
        ends = self.ends.copy()
        ends[self.firsts[1:] - 1] -= self.lengths
        return ends, np.add.reduceat(ends - self.begins, self.firsts[:-1])

    def joins(self) -> np.ndarray:
        """(num_segments,) bool: whether it continues the order of the segment before it."""
        ends, num_seen = self.seen()
        span, num_spans = np.arange(len(ends)), np.diff(self.firsts)
        segment = np.repeat(np.arange(len(num_spans)), num_spans)
        place = span - self.firsts[segment]
        comparable = (segment > 0) & (place < num_spans[segment - 1])
        other = np.where(comparable, self.firsts[segment - 1] + place, 0)
        is_empty = ends == self.begins
        last = np.maximum.reduceat(np.where(is_empty, -1, span), self.firsts[:-1])
        fits = comparable & (self.begins == self.begins[other]) & (ends <= self.ends[other])
        fits &= (ends == self.ends[other]) | (span == last[segment])
        return np.logical_and.reduceat(fits | is_empty, self.firsts[:-1]) & (num_seen > 0)


@lru_cache(maxsize=2)  # every layer of a model passes the same numbers
def prefix_tiles(
    numbers: tuple[bytes, ...], capacity: int, blocks: tuple[int, int], device: torch.device
) -> PrefixTiles:
    """numbers: cu_seqlens, span_begins, span_ends and cu_spans, int64. blocks: rows of a tile where
    there are few in a row that join, and otherwise. ValueError if the spans are inconsistent."""
    bounds, begins, ends, firsts = (np.frombuffer(x, np.int64) for x in numbers)
    segments = _Segments(bounds, firsts, begins, ends)
    check_spans(segments.lengths, np.diff(firsts), begins, ends, capacity)
    starts = bounds[:-1][~segments.joins()]  # of runs of rows
    block = blocks[int(bounds[-1] >= blocks[0] * len(starts))]
    run_lengths = np.diff(np.append(starts, bounds[-1]))
    num_tiles = -(-run_lengths // block)
    first = np.repeat(starts, num_tiles)
    first += block * ranges(np.zeros_like(num_tiles), num_tiles)
    rows = np.minimum(block, np.repeat(starts + run_lengths, num_tiles) - first)
    slots, tiles, keys = _listed(segments, first, rows, block)
    heaviest = np.argsort(-tiles[1] - tiles[3], kind="stable")  # first, so that the end is even
    arrays = (x.astype(np.int32, order="C") for x in (slots, tiles[:, heaviest], keys))
    return PrefixTiles(block, *(torch.from_numpy(x).to(device, non_blocking=True) for x in arrays))


def _listed(
    segments: _Segments, first: np.ndarray, rows: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PrefixTiles' arrays for tiles of `rows` rows from `first` on."""
    segment = np.repeat(np.arange(len(segments.lengths)), segments.lengths)
    offset = np.arange(len(segment)) - segments.bounds[segment]
    slots = segments.own_begins[segment] + offset
    num_seen = segments.seen()[1][segment] + offset  # before each row
    path = num_seen[first]
    at = np.concatenate(([0], np.cumsum(path + rows)))
    keys = np.empty((2, at[-1]), np.int64)
    # cache rows: the beginning of the spans of the tile's first row, then its own rows
    num_spans = np.diff(segments.firsts)[segment[first]]
    span = ranges(segments.firsts[segment[first]], num_spans)
    tile, sizes = np.repeat(np.arange(len(first)), num_spans), segments.ends - segments.begins
    before = np.cumsum(sizes[span]) - sizes[span]
    before -= before[np.cumsum(num_spans) - num_spans][tile]
    taken = np.clip(path[tile] - before, 0, sizes[span])
    keys[0, ranges(at[tile] + before, taken)] = ranges(segments.begins[span], taken)
    own = ranges(at[:-1] + path, rows)
    keys[0, own] = slots[ranges(first, rows)]
    # the rows that see them: a row ends what a tile's earlier rows see beyond its own parent
    row = np.arange(block)
    known = row < rows[:, None]
    depth = np.where(known, num_seen[np.minimum(first[:, None] + row, len(segment) - 1)], at[-1])
    seen = np.minimum.accumulate(depth, axis=1)  # (num_tiles, block) keys of the path
    keys[1] = np.repeat(rows, path + rows)
    tile, row = np.nonzero(seen[:, 1:] < seen[:, :-1])
    dropped = seen[tile, row] - seen[tile, row + 1]
    keys[1, ranges(at[tile] + seen[tile, row + 1], dropped)] = np.repeat(row + 1, dropped)
    keys[1, own] = _own_ends(depth, rows)[known]
    return slots, np.stack((first, rows, at[:-1], path, seen[:, -1])), keys


def _own_ends(depth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(num_tiles, block): the row of its tile that first is no descendant of each row."""
    ends = np.repeat(rows[:, None], depth.shape[1], axis=1)
    for row in range(depth.shape[1] - 1, 0, -1):
        ends[:, :row][depth[:, :row] >= depth[:, row, None]] = row
    return ends
