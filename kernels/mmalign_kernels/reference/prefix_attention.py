"""Prefix attention in plain PyTorch: few large products for any number of segments.

A long span that neighbouring segments share is one product of all their rows with the span. The
rest (short ancestors and the segments themselves) is one batched product over blocks of consecutive
rows, each with a mask and the cache rows that any of its rows attends to. The two are merged by
their logsumexps.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..operation import check_offsets
from .full_attention import attention
from .rotary_attention import angles, rotate

_ROWS = 128  # of a block
_LONG = 64  # keys of a span from which a product of its own pays for merging


class Part(NamedTuple):
    """Consecutive rows that all attend to one span of the cache."""

    rows: slice
    span: slice


class Plan(NamedTuple):
    slots: Tensor | slice  # (total_tokens,) cache row of each token; often one slice
    parts: tuple[Part, ...]
    block_slots: Tensor  # (num_blocks * num_keys,) cache rows of each block, padded by repetition
    block_mask: Tensor  # (num_blocks, 1, _ROWS, num_keys) 0 or -inf


def prefix_attention_update(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, span_begins: Tensor, span_ends: Tensor, cu_spans: Tensor, keys: Tensor,
    values: Tensor, num_attention_heads: int,
) -> Tensor:  # fmt: skip
    check_offsets(cu_seqlens, max_seqlen, len(qkv))
    capacity, num_key_value_heads, head_dim = keys.shape
    out = qkv.new_empty(len(qkv), num_attention_heads, head_dim)
    if not len(qkv):
        return out.flatten(1)
    numbers = (cu_seqlens, span_begins, span_ends, cu_spans)
    plan = _plan(tuple(x.numpy().astype(np.int64).tobytes() for x in numbers), capacity)
    tensors = {name: x for name, x in plan._asdict().items() if isinstance(x, Tensor)}
    plan = plan._replace(**{name: x.to(qkv.device) for name, x in tensors.items()})
    cos, sin = angles(cos, position_ids, qkv), angles(sin, position_ids, qkv)
    sizes = (num_attention_heads, num_key_value_heads, num_key_value_heads)
    q, k, v = qkv.contiguous().unflatten(1, (sum(sizes), head_dim)).split(sizes, 1)
    q = _rotated(q, cos, sin, torch.empty_like(out))
    if isinstance(plan.slots, slice):
        _rotated(k, cos, sin, keys[plan.slots])
    else:
        keys[plan.slots] = _rotated(k, cos, sin, torch.empty_like(k))
    values[plan.slots] = v
    logsumexp = _attend_blocks(out, q, keys, values, plan)
    for rows, span in plan.parts:
        q_rows, k, v = (x[None].transpose(1, 2) for x in (q[rows], keys[span], values[span]))
        part, part_logsumexp = (x[0].transpose(0, 1) for x in attention(q_rows, k, v))
        _merge(out[rows], logsumexp[rows], part, part_logsumexp)
    return out.flatten(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    rotate(x, cos, sin, out)
    return out


def _attend_blocks(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """Writes out (total_tokens, heads, head_dim); returns logsumexp (total_tokens, heads)."""
    num_blocks = len(plan.block_mask)
    if spare := num_blocks * _ROWS - len(q):
        q = torch.cat((q, q.new_zeros(spare, *q.shape[1:])))
    q = q.unflatten(0, (num_blocks, _ROWS)).transpose(1, 2)
    k, v = (
        x.index_select(0, plan.block_slots).unflatten(0, (num_blocks, -1)).transpose(1, 2)
        for x in (keys, values)
    )
    found, logsumexp = attention(q, k, v, mask=plan.block_mask.to(q.dtype))
    out.copy_(found.transpose(1, 2).flatten(0, 1)[: len(out)])
    return logsumexp.transpose(1, 2).flatten(0, 1)[: len(out)]


def _merge(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> None:
    """Merge two softmax averages over different keys into the first, in place."""
    total = torch.logaddexp(logsumexp, other_logsumexp)
    share = (other_logsumexp - total).exp_()[..., None]
    out.lerp_(other.to(out.dtype), share.to(out.dtype))
    logsumexp.copy_(total)


@lru_cache(maxsize=2)  # every layer of a model passes the same numbers
def _plan(numbers: tuple[bytes, ...], capacity: int) -> Plan:
    """numbers: cu_seqlens, span_begins, span_ends and cu_spans, int64."""
    bounds, begins, ends, firsts = (np.frombuffer(x, np.int64) for x in numbers)
    lengths, num_spans = np.diff(bounds), np.diff(firsts)
    check_spans(lengths, num_spans, begins, ends, capacity)
    segment = np.repeat(np.arange(len(lengths)), lengths)  # of each row
    rows = np.arange(len(segment))
    own_end = ends[firsts[1:] - 1]
    slots = own_end[segment] - bounds[1:][segment] + rows
    # what each row attends to: (row, begin, end), segments split at the ends of blocks
    span = ranges(firsts[:-1][segment], num_spans[segment])
    row = np.repeat(rows, num_spans[segment])
    begin, end = begins[span], ends[span].copy()
    is_last = span == firsts[1:][segment][row] - 1
    cut = np.maximum(bounds[:-1][segment], rows // _ROWS * _ROWS)  # first own row in the block
    piece_begin = slots[cut]
    end[is_last] = piece_begin[row[is_last]]  # the part of the last span before the piece
    kept = end > begin
    row, begin, end = row[kept], begin[kept], end[kept]
    is_long = end - begin >= _LONG
    short = ~is_long
    seen = (
        np.concatenate((row[short], rows)),
        np.concatenate((begin[short], piece_begin)),
        np.concatenate((end[short], slots + 1)),
    )
    parts = _parts(row[is_long], begin[is_long], end[is_long])
    one_run = (np.diff(slots) == 1).all()
    places = slice(int(slots[0]), int(slots[-1]) + 1) if one_run else torch.from_numpy(slots)
    return Plan(places, parts, *_blocks(*seen, len(rows), capacity))


def check_spans(
    lengths: np.ndarray, num_spans: np.ndarray, begins: np.ndarray, ends: np.ndarray, capacity: int
) -> None:
    """ValueError if a span exceeds the cache or is too short for its segment's own rows."""
    if num_spans.sum() != len(begins) or (num_spans < 1).any():
        raise ValueError(
            f"cu_spans must rise from 0 to {len(begins)}, at least one span per segment"
        )
    if (begins < 0).any() or (ends > capacity).any() or (ends < begins).any():
        raise ValueError(
            f"spans must lie within the {capacity} rows of the cache, begin before end"
        )
    last = np.cumsum(num_spans) - 1
    if (ends[last] - begins[last] < lengths).any():
        raise ValueError("a segment's last span must end with the segment's own rows")


def ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... (lengths[0] numbers), begins[1], ..."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begins - offsets, lengths)


def _parts(row: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[Part, ...]:
    """Runs of neighbouring rows with one span."""
    order = np.lexsort((row, end, begin))
    row, begin, end = row[order], begin[order], end[order]
    new = (np.diff(row) != 1) | (np.diff(begin) != 0) | (np.diff(end) != 0)
    first = np.concatenate(([0], np.flatnonzero(new) + 1))[: len(row)]
    last = np.concatenate((np.flatnonzero(new), [len(row) - 1]))[: len(row)]
    return tuple(
        Part(slice(int(row[i]), int(row[j]) + 1), slice(int(begin[i]), int(end[i])))
        for i, j in zip(first, last, strict=True)
    )


def _blocks(
    row: np.ndarray, begin: np.ndarray, end: np.ndarray, num_rows: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """block_slots and block_mask of a Plan for rows that attend to cache rows begin to end - 1."""
    num_blocks = -(-num_rows // _ROWS)
    block = row // _ROWS
    wanted = np.unique(np.stack((block, begin, end)), axis=1)
    # block and cache row in one number, so that one sort and search serve all blocks
    seen = np.unique(ranges(wanted[0] * capacity + wanted[1], wanted[2] - wanted[1]))
    first = np.searchsorted(seen, np.arange(num_blocks + 1) * capacity)
    num_keys = int(np.diff(first).max())
    column = np.minimum(np.arange(num_keys), np.diff(first)[:, None] - 1)
    block_slots = seen[first[:-1, None] + column] % capacity  # (num_blocks, num_keys)
    changes = np.zeros((num_blocks * _ROWS, num_keys + 1), np.int8)
    for bound, change in ((begin, 1), (end, -1)):
        at = np.searchsorted(seen, block * capacity + bound) - first[block]
        np.add.at(changes, (row, at), change)
    visible = np.cumsum(changes[:, :-1], axis=1, dtype=np.int8) > 0
    visible[num_rows:, 0] = True  # padding rows must attend to something
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    mask = mask.view(num_blocks, 1, _ROWS, num_keys)
    return torch.from_numpy(block_slots.flatten()), mask
