"""Prefix attention in plain PyTorch: few large products however many segments there are.

Wide spans that neighbouring segments share are one product of all their rows with the span. What
remains (short ancestors and the segments themselves) goes by blocks of consecutive rows, each with
the cache rows that any of its rows sees and a mask: one product for all blocks. The two are joined
by their logsumexps.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..operation import check_offsets, compute_dtype
from .rotary_attention import angles, rotate

aten = torch.ops.aten
_ROWS = 128  # of a block
_WIDE = 64  # keys from which a span of its own pays for joining


class Part(NamedTuple):
    """Consecutive rows that all see one span of the cache."""

    rows: slice
    span: slice


class Plan(NamedTuple):
    slots: Tensor | slice  # (total_tokens,) where keys and values of each row go; often one run
    parts: tuple[Part, ...]
    block_slots: Tensor  # (num_blocks * num_keys,) cache rows that a block sees; spare ones repeat
    block_mask: Tensor  # (num_blocks, 1, _ROWS, num_keys) 0 or -inf


def prefix_attention_update(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    span_begins: Tensor,
    span_ends: Tensor,
    cu_spans: Tensor,
    keys: Tensor,
    values: Tensor,
    num_attention_heads: int,
) -> Tensor:
    check_offsets(cu_seqlens, max_seqlen, len(qkv))
    capacity, num_key_value_heads, head_dim = keys.shape
    out = qkv.new_empty(len(qkv), num_attention_heads, head_dim)
    if not len(qkv):
        return out.flatten(1)
    numbers = (cu_seqlens, span_begins, span_ends, cu_spans)
    plan = _plan(*(x.cpu().numpy().astype(np.int64).tobytes() for x in numbers), capacity)
    plan = Plan(*(x.to(qkv.device) if isinstance(x, Tensor) else x for x in plan))
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
        part = _attention(*(x[None].transpose(1, 2) for x in (q[rows], keys[span], values[span])))
        _join(out[rows], logsumexp[rows], *(x[0].transpose(0, 1) for x in part))
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
    found, logsumexp = _attention(q, k, v, plan.block_mask.to(q.dtype))
    out.copy_(found.transpose(1, 2).flatten(0, 1)[: len(out)])
    return logsumexp.transpose(1, 2).flatten(0, 1)[: len(out)]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of (count, heads, length, head_dim)."""
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
    scores = (q @ k.repeat_interleave(group, 1).transpose(2, 3)) * q.shape[3] ** -0.5
    scores = scores if mask is None else scores + mask
    logsumexp = scores.logsumexp(3)
    return (scores - logsumexp[..., None]).exp() @ v.repeat_interleave(group, 1), logsumexp


def _join(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> None:
    """Joins two softmax averages over different keys into the first, in place."""
    total = torch.logaddexp(logsumexp, other_logsumexp)
    share = (other_logsumexp - total).exp_()[..., None]
    out.lerp_(other.to(out.dtype), share.to(out.dtype))
    logsumexp.copy_(total)


@lru_cache(maxsize=2)  # every layer of a model asks with the same numbers
def _plan(cu_seqlens: bytes, begins: bytes, ends: bytes, cu_spans: bytes, capacity: int) -> Plan:
    bounds, begins, ends, firsts = (
        np.frombuffer(x, np.int64) for x in (cu_seqlens, begins, ends, cu_spans)
    )
    lengths, num_spans = np.diff(bounds), np.diff(firsts)
    _check_spans(lengths, num_spans, begins, ends, capacity)
    segment = np.repeat(np.arange(len(lengths)), lengths)  # of each row
    rows = np.arange(len(segment))
    own_end = ends[firsts[1:] - 1]
    slots = own_end[segment] - bounds[1:][segment] + rows
    # what each row sees: (row, begin, end), the segments cut where blocks end
    span = _ranges(firsts[:-1][segment], num_spans[segment])
    row = np.repeat(rows, num_spans[segment])
    begin, end = begins[span], ends[span].copy()
    is_last = span == firsts[1:][segment][row] - 1
    cut = np.maximum(bounds[:-1][segment], rows // _ROWS * _ROWS)  # first own row in the block
    piece_begin = slots[cut]
    end[is_last] = piece_begin[row[is_last]]  # the part of the last span before the piece
    kept = end > begin
    row, begin, end = row[kept], begin[kept], end[kept]
    is_wide = end - begin >= _WIDE
    narrow = ~is_wide
    seen = (
        np.concatenate((row[narrow], rows)),
        np.concatenate((begin[narrow], piece_begin)),
        np.concatenate((end[narrow], slots + 1)),
    )
    parts = _parts(row[is_wide], begin[is_wide], end[is_wide])
    one_run = (np.diff(slots) == 1).all()
    places = slice(int(slots[0]), int(slots[-1]) + 1) if one_run else torch.from_numpy(slots)
    return Plan(places, parts, *_blocks(*seen, len(rows), capacity))


def _check_spans(
    lengths: np.ndarray, num_spans: np.ndarray, begins: np.ndarray, ends: np.ndarray, capacity: int
) -> None:
    """ValueError where a span leaves the cache or a segment has no room for its own rows."""
    if num_spans.sum() != len(begins) or (num_spans < 1).any():
        raise ValueError(f"cu_spans must rise from 0 to {len(begins)}, a span or more a segment")
    if (begins < 0).any() or (ends > capacity).any() or (ends < begins).any():
        raise ValueError(f"spans must lie in the {capacity} rows of the cache, begin before end")
    last = np.cumsum(num_spans) - 1
    if (ends[last] - begins[last] < lengths).any():
        raise ValueError("a segment's last span must hold the segment's own rows at its end")


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
    """block_slots and block_mask of a Plan for rows that see cache rows begin to end - 1."""
    num_blocks = -(-num_rows // _ROWS)
    block = row // _ROWS
    wanted = np.unique(np.stack((block, begin, end)), axis=1)
    # a block and a cache row in one number, so that sorting and searching take all blocks at once
    seen = np.unique(_ranges(wanted[0] * capacity + wanted[1], wanted[2] - wanted[1]))
    first = np.searchsorted(seen, np.arange(num_blocks + 1) * capacity)
    num_keys = int(np.diff(first).max())
    column = np.minimum(np.arange(num_keys), np.diff(first)[:, None] - 1)
    block_slots = seen[first[:-1, None] + column] % capacity  # (num_blocks, num_keys)
    changes = np.zeros((num_blocks * _ROWS, num_keys + 1), np.int8)
    for bound, change in ((begin, 1), (end, -1)):
        at = np.searchsorted(seen, block * capacity + bound) - first[block]
        np.add.at(changes, (row, at), change)
    visible = np.cumsum(changes[:, :-1], axis=1, dtype=np.int8) > 0
    visible[num_rows:, 0] = True  # spare rows: anything but nothing
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    mask = mask.view(num_blocks, 1, _ROWS, num_keys)
    return torch.from_numpy(block_slots.flatten()), mask
