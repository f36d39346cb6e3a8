"""Tiles of prefix attention say the same as the spans, whatever the forest."""

import numpy as np
import pytest
import torch
from mmalign_kernels.triton.prefix_tiles import PrefixTiles, prefix_tiles

from bench.documents import NumberTokenizer, synthetic_truthfulqa
from mmalign.evaluation.prefix_tree import build_tree, cut_batches
from mmalign.evaluation.scoring import plan_scoring

Spans = list[list[tuple[int, int]]]


def tiles_of(lengths: list[int], spans: Spans, capacity: int, blocks=(4, 8)) -> PrefixTiles:
    begins, ends = np.array([span for some in spans for span in some]).T
    bounds, firsts = (np.cumsum([0, *x]) for x in (lengths, map(len, spans)))
    numbers = tuple(x.astype(np.int64).tobytes() for x in (bounds, begins, ends, firsts))
    return prefix_tiles(numbers, capacity, blocks, torch.device("cpu"))


def seen_by_spans(lengths: list[int], spans: Spans, capacity: int) -> np.ndarray:
    """(num_tokens, capacity): how often a row sees a cache row."""
    rows = []
    for length, (*whole, (begin, end)) in zip(lengths, spans, strict=True):
        for last in range(end - length + 1, end + 1):
            row = np.zeros(capacity, int)
            for span in (*whole, (begin, last)):
                row[slice(*span)] += 1
            rows.append(row)
    return np.array(rows).reshape(-1, capacity)


def seen_by_tiles(plan: PrefixTiles, capacity: int) -> np.ndarray:
    """What the kernel does with the lists."""
    assert all(x.is_contiguous() for x in plan[1:])
    seen = np.zeros((len(plan.slots), capacity), int)
    slots, until = plan.keys.numpy()
    owned = []
    for first, rows, at, path, shared in plan.tiles.T.tolist():
        assert 0 < rows <= plan.block
        owned += range(first, first + rows)
        for i, key in enumerate(range(at, at + path + rows)):
            of_all = range(rows) if i < shared else range(max(i - path, 0), until[key])
            assert i >= shared or until[key] == rows
            seen[first + np.array(of_all, int), slots[key]] += 1
    assert sorted(owned) == list(range(len(plan.slots)))
    return seen


def check(lengths: list[int], spans: Spans, capacity: int) -> PrefixTiles:
    plan = tiles_of(lengths, spans, capacity)
    expected = seen_by_spans(lengths, spans, capacity)
    assert (seen_by_tiles(plan, capacity) == expected).all()
    own = [np.arange(span[-1][1] - n, span[-1][1]) for n, span in zip(lengths, spans, strict=True)]
    assert (plan.slots.numpy() == np.concatenate(own)).all()
    return plan


@pytest.mark.parametrize("seed", range(20))
def test_batches_of_a_tree(seed):
    draw = np.random.default_rng(seed)
    alphabet, longest = draw.integers(2, 5), draw.integers(2, 30)
    sequences = [draw.integers(0, alphabet, draw.integers(1, longest)) for _ in range(60)]
    tree = build_tree([x.astype(np.int32) for x in sequences])
    for batch in cut_batches(tree, int(draw.integers(5, 100))):
        lengths = np.diff(batch.cu_seqlens).tolist()
        pairs = list(zip(batch.span_begins.tolist(), batch.span_ends.tolist(), strict=True))
        bounds = batch.cu_spans.tolist()
        spans = [pairs[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        plan = check(lengths, spans, batch.num_kept + batch.end - batch.begin)
        roots = (tree.parents[batch.begin + 1 : batch.end] < 0).sum()  # where a tile begins anew
        assert plan.tiles.shape[1] <= len(plan.slots) / plan.block + 1 + roots


@pytest.mark.parametrize("seed", range(20))
def test_segments_in_any_order(seed):
    """Each continues a random one, and rows lie anywhere in the cache, as the operation allows."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 9, 12).tolist()
    bounds, at = {}, 3
    for i in draw.permutation(12):
        bounds[i] = at, at + lengths[i]
        at += lengths[i] + int(draw.integers(0, 2))
    spans: Spans = []
    for i in range(12):
        parent = int(draw.integers(-2, i)) if i else -1
        before = spans[parent] if parent >= 0 else [(0, 3)] if parent == -1 else []
        spans.append([*before, bounds[i]])
    check(lengths, spans, at)


def test_samples_with_caches_of_their_own():
    """Of one token: few rows, and nothing is listed for two of them."""
    spans = [[(0, 5), (i * 10 + 5, i * 10 + 12)] for i in range(6)]
    plan = check([1] * 6, spans, 70)
    assert plan.block == 4 and plan.tiles.shape[1] == 6 and plan.keys.shape[1] == 6 * 12


def test_children_of_one_parent_share_a_tile():
    """Its keys once, and the children: the last four of 20 with four of 8, then the other four."""
    spans = [[(0, 20)], *([(0, 20), (20 + i, 21 + i)] for i in range(8))]
    plan = check([20, *[1] * 8], spans, 28)
    assert plan.block == 8
    rows, path, shared = plan.tiles[[1, 3, 4]].tolist()
    assert (rows, path, shared) == ([8, 4, 8, 8], [16, 20, 8, 0], [16, 20, 8, 0])


def test_a_tree_as_truthfulqas_is_mostly_needed_pairs():
    """With tiles of one segment each it was 14 times what is needed, 5 times with 16 x 64."""
    requests = synthetic_truthfulqa(32000)[:3000]
    plan = plan_scoring(NumberTokenizer(), requests, 2048, 32000, 4096, progress=False)
    formed = needed = 0
    for batch in plan.batches:
        numbers = (batch.cu_seqlens, batch.span_begins, batch.span_ends, batch.cu_spans)
        capacity = batch.num_kept + batch.end - batch.begin
        numbers = tuple(x.astype(np.int64).tobytes() for x in numbers)
        tiles = prefix_tiles(numbers, capacity, (16, 64), torch.device("cpu"))
        num_keys = (tiles.tiles[1] + tiles.tiles[3]).numpy()
        formed += tiles.block * 32 * int((-(-num_keys // 32)).sum())
        needed += int((plan.tree.depths[batch.begin : batch.end] + 1).sum())
    assert needed < formed < 1.6 * needed
