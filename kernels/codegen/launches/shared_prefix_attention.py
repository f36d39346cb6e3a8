"""Attention after a shared prefix at the shapes of LLaMA2-7B, OpenLLaMA-3B and a grouped one."""

import torch
from mmalign_kernels import dispatch
from mmalign_kernels.triton import shared_prefix_attention as shared_prefix

from ..compiler import meta
from .rotary_attention import MODELS, POSITIONS, SAMPLES, TOKENS

PREFIX = 35


def launch(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    position_ids = meta(TOKENS, dtype=torch.int32)
    cu_seqlens = meta(SAMPLES + 1, dtype=torch.int32)
    prefix = (meta(PREFIX, num_kv_heads, head_dim), meta(PREFIX, num_kv_heads, head_dim))
    rotation = (cos, sin, position_ids, cu_seqlens)
    with dispatch.use_backend("triton"):
        out, logsumexp = shared_prefix.shared_prefix_attention_fwd(
            qkv, *rotation, POSITIONS, *prefix, num_heads
        )
        shared_prefix.shared_prefix_attention_bwd(
            out, qkv, out, logsumexp, *rotation, *prefix, POSITIONS, num_heads
        )


LAUNCHES = {name: lambda heads=heads: launch(*heads) for name, heads in MODELS.items()}
MATRIX = {"_join_prefix_kernel", "_prefix_dq_kernel"}
