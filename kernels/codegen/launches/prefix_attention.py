"""Prefix attention at the shapes of LLaMA2-7B, OpenLLaMA-3B and a grouped one, mid-evaluation."""

import torch
from mmalign_kernels.triton import prefix_attention as prefix

from ..compiler import meta
from .rotary_attention import MODELS

TOKENS, SPANS, KEPT, POSITIONS = 8192, 2100, 300, 2048
SEGMENTS = {"": 200, ", short segments": 1200}


def launch(segments: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_dim)
    keys, values = (meta(KEPT + TOKENS, num_kv_heads, head_dim) for _ in range(2))
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    position_ids, cu_seqlens, span_begins, span_ends, cu_spans = (
        meta(n, dtype=torch.int32) for n in (TOKENS, segments + 1, SPANS, SPANS, segments + 1)
    )
    prefix.prefix_attention_update(
        qkv, cos, sin, position_ids, cu_seqlens, POSITIONS,
        span_begins, span_ends, cu_spans, keys, values, num_heads,
    )  # fmt: skip


LAUNCHES = {
    name + kind: lambda segments=segments, heads=heads: launch(segments, *heads)
    for kind, segments in SEGMENTS.items()
    for name, heads in MODELS.items()
}
MATRIX = {"_prefix_attention_kernel"}
