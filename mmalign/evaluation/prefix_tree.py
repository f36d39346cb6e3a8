"""PrefixTree: token sequences as a tree of shared prefixes, cut into batches of a packed forward.

In a causal model a row depends only on the tokens before it, so each distinct prefix is computed
once, however many sequences start with it. Tokens are numbered depth first; a segment is a run of
them without a branch, a batch a run of consecutive tokens. From earlier batches a batch then needs
only the path from the root to its first token: in depth-first order an ancestor of any later token
is an ancestor of the next one. So the keys and values kept between batches are at most one path
long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefixTree:
    tokens: np.ndarray  # (num_tokens,) int32, depth first
    parents: np.ndarray  # (num_tokens,) the token before; -1 at a root
    depths: np.ndarray  # (num_tokens,) distance from the root: the position in each sequence
    segment_begins: np.ndarray  # (num_segments,) first token of each segment
    paths: list[np.ndarray]  # token numbers of each input sequence


@dataclass(frozen=True)
class TreeBatch:
    """Consecutive tokens of a tree, with the arguments of prefix_attention.

    The cache holds the path to the first token in rows 0 to num_kept - 1, where a token's row is
    its depth; the batch's own keys and values follow.
    """

    begin: int  # tokens begin to end - 1
    end: int
    num_kept: int
    cu_seqlens: np.ndarray  # (num_segments + 1,), segments cut where the batch ends
    span_begins: np.ndarray  # (num_spans,) cache rows
    span_ends: np.ndarray
    cu_spans: np.ndarray  # (num_segments + 1,)
    next_rows: np.ndarray  # cache rows of this batch on the path to the next one
    next_depth: int  # of the first of them


def build_tree(sequences: Sequence[np.ndarray]) -> PrefixTree:
    """The tree of integer sequences of at least one token each; equal ones merge."""
    # big-endian numbers sort as their bytes do, which puts sequences with a shared prefix together
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]
    tokens, parents, depths, paths = [], [], [], {}
    previous, path, num_tokens = np.empty(0, ">i4"), np.empty(0, np.int64), 0
    for key in sorted(set(keys)):
        sequence = np.frombuffer(key, ">i4")
        shared = _shared_length(previous, sequence)
        new = np.arange(num_tokens, num_tokens + len(sequence) - shared)
        path = np.concatenate((path[:shared], new))
        tokens.append(sequence[shared:])
        parents.append(np.concatenate(([-1], path))[shared : len(sequence)])
        depths.append(np.arange(shared, len(sequence)))
        paths[key], previous, num_tokens = path, sequence, num_tokens + len(new)
    flat = [np.concatenate((np.empty(0, np.int64), *parts)) for parts in (tokens, parents, depths)]
    return PrefixTree(
        tokens=flat[0].astype(np.int32),
        parents=flat[1],
        depths=flat[2],
        segment_begins=_segment_begins(flat[1]),
        paths=[paths[key] for key in keys],
    )


def _shared_length(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _segment_begins(parents: np.ndarray) -> np.ndarray:
    """Tokens that are not the only child of the token before them."""
    num_children = np.bincount(parents[parents >= 0], minlength=len(parents))
    before = np.arange(len(parents)) - 1
    only_child = (parents == before) & (num_children[before] == 1) & (before >= 0)
    return np.flatnonzero(~only_child)


def cut_batches(tree: PrefixTree, batch_tokens: int) -> list[TreeBatch]:
    """Batches of batch_tokens tokens; the last one takes the rest."""
    num_tokens = len(tree.tokens)
    begins = range(0, num_tokens, batch_tokens)
    return [_batch(tree, begin, min(begin + batch_tokens, num_tokens)) for begin in begins]


def _batch(tree: PrefixTree, begin: int, end: int) -> TreeBatch:
    first, last = np.searchsorted(tree.segment_begins, (begin, end))
    bounds = np.unique(np.concatenate(([begin], tree.segment_begins[first:last], [end])))
    num_kept = int(tree.depths[begin])
    spans, counts = _spans(tree, bounds.tolist(), num_kept)
    next_rows = np.empty(0, np.int64)
    if end < len(tree.tokens):
        next_rows = _ancestors(tree.parents, end, begin) - begin + num_kept
    return TreeBatch(
        begin=begin,
        end=end,
        num_kept=num_kept,
        cu_seqlens=bounds - begin,
        span_begins=spans[:, 0],
        span_ends=spans[:, 1],
        cu_spans=np.concatenate(([0], np.cumsum(counts))),
        next_rows=next_rows,
        next_depth=int(tree.depths[end]) - len(next_rows) if end < len(tree.tokens) else 0,
    )


def _spans(tree: PrefixTree, bounds: list[int], num_kept: int) -> tuple[np.ndarray, list[int]]:
    """Cache rows that each segment of a batch attends to, its own last, and spans per segment."""
    to_row = num_kept - bounds[0]
    spans_ending_at: dict[int, list[tuple[int, int]]] = {}  # by the last token of a segment
    spans, counts = [], []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        parent, depth = int(tree.parents[begin]), int(tree.depths[begin])
        kept = [(0, depth)] if depth else []  # where the segment branches off the kept path
        seen = spans_ending_at[parent] if parent >= bounds[0] else kept
        own_begin, own_end = begin + to_row, end + to_row
        if seen and seen[-1][1] == own_begin:  # adjacent rows are one span
            *seen, (own_begin, _) = seen
        seen = [*seen, (own_begin, own_end)]
        spans_ending_at[end - 1] = seen
        spans += seen
        counts.append(len(seen))
    return np.array(spans, np.int64), counts


def _ancestors(parents: np.ndarray, token: int, first: int) -> np.ndarray:
    """Ancestors of a token with a number of at least `first`, from the root down."""
    found = []
    while (token := int(parents[token])) >= first and token >= 0:
        found.append(token)
    return np.array(found[::-1], np.int64)
