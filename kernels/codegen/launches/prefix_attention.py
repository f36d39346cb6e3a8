"""Prefix attention at the shapes of LLaMA2-7B, OpenLLaMA-3B and a grouped one.

A batch of a tree, mid-evaluation, and a token of each of some samples, in generation.
"""

import torch
from mmalign_kernels.triton import prefix_attention as prefix

from ..compiler import meta
from .rotary_attention import MODELS

KEPT, POSITIONS = 300, 2048
KINDS = {"": (200, 41), ", one token": (64, 1)}  # segments, and tokens in each


def launch(segments: int, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    num_tokens, capacity = segments * tokens, segments * (KEPT + tokens)
    qkv = meta(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    keys, values = (meta(capacity, num_kv_heads, head_dim) for _ in range(2))
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    own = KEPT + torch.arange(segments) * tokens
    begins, ends = torch.stack((torch.zeros_like(own), own), 1), own[:, None] + tokens
    ends = torch.cat((torch.full_like(ends, KEPT), ends), 1)
    if tokens == 1:  # every sample has a cache of its own
        ends = torch.arange(1, segments + 1)[:, None] * (KEPT + 1)
        begins = ends - KEPT - 1
    prefix.prefix_attention_update(
        qkv, cos, sin, meta(num_tokens, dtype=torch.int32),
        torch.arange(segments + 1) * tokens, POSITIONS, begins.flatten(), ends.flatten(),
        torch.arange(segments + 1) * begins.shape[1], keys, values, num_heads,
    )  # fmt: skip


LAUNCHES = {
    name + kind: lambda sizes=sizes, heads=heads: launch(*sizes, *heads)
    for kind, sizes in KINDS.items()
    for name, heads in MODELS.items()
}
MATRIX = {"_prefix_attention_kernel"}
