"""Positions of packed tokens, and attention of these tokens to each other and to cached ones.

Positions is all that a decoder layer knows of its attention; each class here is a way to attend:

    PackedPositions    samples of a training batch, each to itself
    PrefixedPositions  the same after a prefix that does not learn, with a gradient for the samples
    CachedPositions    new tokens after cached ones: generation
    PathPositions      batches of a prefix tree one after the other: scoring
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from mmalign_kernels import prefix_attention, rotary_attention, shared_prefix_attention
from torch import Tensor

from mmalign.model.config import DecoderConfig


class Positions(Protocol):
    """One layer's attention: which tokens each token of the packed row sees."""

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        """(total_tokens, qkv columns) -> (total_tokens, num_attention_heads * head_dim)."""
        ...


@dataclass(frozen=True)
class PackedPositions:
    """The position of each token in its sample, and the rotary tables."""

    cos: Tensor  # (max_positions, head_dim // 2) fp32
    sin: Tensor  # (max_positions, head_dim // 2) fp32
    position_ids: Tensor  # (total_tokens,) int32
    cu_seqlens: Tensor  # (num_samples + 1,) int32
    max_seqlen: int

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        return rotary_attention(
            qkv,
            self.cos,
            self.sin,
            self.position_ids,
            self.cu_seqlens,
            self.max_seqlen,
            num_attention_heads,
            num_key_value_heads,
        )


def cache_bytes(config: DecoderConfig, num_rows: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of num_rows tokens in one layer."""
    return 2 * num_rows * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KeyValues:
    """The rows of one layer: keys (rotated) and values (num_rows, key_value_heads, head_dim)."""

    def __init__(self, config: DecoderConfig, num_rows: int, like: Tensor):
        """Uninitialised; dtype and device are those of `like`."""
        shape = (num_rows, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)


@dataclass(frozen=True)
class PrefixedPositions:
    """Samples that all follow one prefix, whose keys and values are constants."""

    samples: PackedPositions  # position_ids from the end of the prefix on
    prefix: KeyValues

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        return shared_prefix_attention(
            qkv,
            self.samples.cos,
            self.samples.sin,
            self.samples.position_ids,
            self.samples.cu_seqlens,
            self.samples.max_seqlen,
            self.prefix.keys,
            self.prefix.values,
            num_attention_heads,
        )


@dataclass(frozen=True)
class CachedPositions:
    """Segments of new tokens, and the cache rows that each segment sees, its own at the end.

    Spans and cu_seqlens are on the CPU: what is computed depends on them.
    """

    samples: PackedPositions  # a segment is a sample
    span_begins: Tensor  # (num_spans,) int32; spans as prefix_attention takes them
    span_ends: Tensor  # (num_spans,) int32
    cu_spans: Tensor  # (num_segments + 1,) int32
    cache: KeyValues

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        return prefix_attention(
            qkv,
            self.samples.cos,
            self.samples.sin,
            self.samples.position_ids,
            self.samples.cu_seqlens,
            self.samples.max_seqlen,
            self.span_begins,
            self.span_ends,
            self.cu_spans,
            self.cache.keys,
            self.cache.values,
            num_attention_heads,
        )


class PathCache:
    """Keys and values on the path to the next batch of a prefix tree, for every layer.

    All layers share one workspace for the rows of a batch, which nothing reads after the layer.
    Bytes: cache_bytes of path_rows for each layer, and once of workspace_rows, which must hold a
    path and the batch that follows it.
    """

    def __init__(self, config: DecoderConfig, path_rows: int, workspace_rows: int, like: Tensor):
        layers = range(config.num_hidden_layers)
        self.paths = [KeyValues(config, path_rows, like) for _ in layers]
        self.workspace = KeyValues(config, workspace_rows, like)


@dataclass(frozen=True)
class PathPositions:
    """One layer's attention through a PathCache; moves what the next batch needs to its path."""

    positions: CachedPositions  # in the workspace; the same for all layers
    path: KeyValues
    num_kept: int
    next_rows: Tensor  # (num_rows,) workspace rows that go on the path ...
    next_depth: int  # ... from this row of it on

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        cache = self.positions.cache
        pairs = ((cache.keys, self.path.keys), (cache.values, self.path.values))
        for workspace, path in pairs:
            workspace[: self.num_kept] = path[: self.num_kept]
        attended = self.positions.attend(qkv, num_attention_heads, num_key_value_heads)
        for workspace, path in pairs:
            moved = slice(self.next_depth, self.next_depth + len(self.next_rows))
            path[moved] = workspace.index_select(0, self.next_rows)
        return attended
