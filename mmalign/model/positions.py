"""Keys and values that later tokens attend to, and attention of new tokens through them.

PrefixedPositions is one layer's attention in training, after a prefix that does not learn: the only
one with a gradient. CachedPositions is one layer's attention in its own cache: what generation
needs. PathCache keeps the path to the next batch of a prefix tree for every layer, and gives all
layers one workspace for the rows of a batch, which nobody needs after the layer.
"""

from dataclasses import dataclass

import torch
from mmalign_kernels import prefix_attention, shared_prefix_attention
from torch import Tensor

from mmalign.model.config import DecoderConfig
from mmalign.model.layers import PackedPositions


def cache_bytes(config: DecoderConfig, num_rows: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of num_rows tokens in one layer."""
    return 2 * num_rows * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KeyValues:
    """The rows of one layer: keys (rotated) and values (num_rows, key_value_heads, head_dim)."""

    def __init__(self, config: DecoderConfig, num_rows: int, beside: Tensor):
        shape = (num_rows, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = beside.new_empty(shape), beside.new_empty(shape)


@dataclass(frozen=True)
class PrefixedPositions:
    """Samples that all follow one prefix, whose keys and values are constants."""

    samples: PackedPositions  # position_ids from the end of the prefix on
    prefix: KeyValues

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        """(total_tokens, qkv columns) -> (total_tokens, num_attention_heads * head_dim)."""
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
    """Where each token of a packed row of segments stands, and the cache rows that it sees."""

    cos: Tensor  # (max_positions, head_dim // 2) fp32
    sin: Tensor  # (max_positions, head_dim // 2) fp32
    position_ids: Tensor  # (total_tokens,) int32
    cu_seqlens: Tensor  # (num_segments + 1,) int32
    max_seqlen: int
    span_begins: Tensor  # (num_spans,) int32; spans as prefix_attention takes them
    span_ends: Tensor  # (num_spans,) int32
    cu_spans: Tensor  # (num_segments + 1,) int32
    cache: KeyValues

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        """(total_tokens, qkv columns) -> (total_tokens, num_attention_heads * head_dim)."""
        return prefix_attention(
            qkv,
            self.cos,
            self.sin,
            self.position_ids,
            self.cu_seqlens,
            self.max_seqlen,
            self.span_begins,
            self.span_ends,
            self.cu_spans,
            self.cache.keys,
            self.cache.values,
            num_attention_heads,
        )


class PathCache:
    """Keys and values on the path to the next batch, for every layer.

    Bytes: cache_bytes of path_rows for each layer, and once of workspace_rows, which must hold a
    path and the batch that follows it.
    """

    def __init__(self, config: DecoderConfig, path_rows: int, workspace_rows: int, beside: Tensor):
        layers = range(config.num_hidden_layers)
        self.paths = [KeyValues(config, path_rows, beside) for _ in layers]
        self.workspace = KeyValues(config, workspace_rows, beside)


@dataclass(frozen=True)
class PathPositions:
    """One layer's attention through a PathCache; moves what the next batch needs to its path."""

    positions: CachedPositions  # in the workspace; the same for all layers
    path: KeyValues
    num_kept: int
    next_rows: Tensor  # (num_rows,) workspace rows that go on the path ...
    next_depth: int  # ... from this row of it on

    def attend(self, qkv: Tensor, num_attention_heads: int, num_key_value_heads: int) -> Tensor:
        room = self.positions.cache
        pairs = ((room.keys, self.path.keys), (room.values, self.path.values))
        for inside, kept in pairs:
            inside[: self.num_kept] = kept[: self.num_kept]
        attended = self.positions.attend(qkv, num_attention_heads, num_key_value_heads)
        for inside, kept in pairs:
            moved = slice(self.next_depth, self.next_depth + len(self.next_rows))
            kept[moved] = inside.index_select(0, self.next_rows)
        return attended
