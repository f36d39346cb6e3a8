"""Rotary attention at the shapes of LLaMA2-7B, OpenLLaMA-3B and two smaller ones."""

import torch
from mmalign_kernels.triton import rotary_attention as rotary

from ..compiler import meta

TOKENS, SAMPLES, POSITIONS = 16384, 27, 2048
MODELS = {  # heads, key and value heads, head_dim
    "LLaMA2-7B": (32, 32, 128),
    "OpenLLaMA-3B": (32, 32, 100),
    "grouped, head_dim 64": (32, 4, 64),
}


def launch(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    position_ids = meta(TOKENS, dtype=torch.int32)
    cu_seqlens = meta(SAMPLES + 1, dtype=torch.int32)
    settings = (cos, sin, position_ids, cu_seqlens, POSITIONS, num_heads, num_kv_heads, True)
    out, logsumexp = rotary.rotary_attention_fwd(qkv, *settings)
    rotary.rotary_attention_bwd(out, qkv, out, logsumexp, *settings)


LAUNCHES = {name: lambda heads=heads: launch(*heads) for name, heads in MODELS.items()}
# _rotate_keys_kernel moves 128 bits at a time but where head_dim is 100: its halves are 100 bytes
MATRIX = {"_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"}
