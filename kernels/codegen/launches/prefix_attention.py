"""Prefix attention at the shapes of LLaMA2-7B, OpenLLaMA-3B and a grouped one, mid-evaluation."""

import torch
from mmalign_kernels.triton import prefix_attention as prefix

from ..compiler import meta
from .rotary_attention import MODELS, TESTED_HEADS

TOKENS, SEGMENTS, SPANS, KEPT, POSITIONS = 8192, 900, 2100, 300, 2048


def launch(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_dim)
    keys, values = (meta(KEPT + TOKENS, num_kv_heads, head_dim) for _ in range(2))
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    position_ids, cu_seqlens, span_begins, span_ends, cu_spans = (
        meta(n, dtype=torch.int32) for n in (TOKENS, SEGMENTS + 1, SPANS, SPANS, SEGMENTS + 1)
    )
    prefix.prefix_attention_update(
        qkv, cos, sin, position_ids, cu_seqlens, POSITIONS,
        span_begins, span_ends, cu_spans, keys, values, num_heads,
    )  # fmt: skip


LAUNCHES = {name: lambda heads=heads: launch(*heads) for name, heads in MODELS.items()}
TESTED = {str(heads): lambda heads=heads: launch(*heads) for heads in TESTED_HEADS}
MATRIX = {"_prefix_attention_kernel"}
