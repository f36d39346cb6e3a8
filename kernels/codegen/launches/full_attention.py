"""Full attention at the shape of CLIP ViT-L/14."""

import torch
from mmalign_kernels.triton import full_attention as attention

from ..compiler import meta

TOKENS, IMAGES = 32 * 257, 32


def launch(num_heads: int, head_dim: int) -> None:
    qkv = meta(TOKENS, 3 * num_heads * head_dim)
    cu_seqlens = meta(IMAGES + 1, dtype=torch.int32)
    out, logsumexp = attention.full_attention_fwd(qkv, cu_seqlens, 257, num_heads)
    attention.full_attention_bwd(out, qkv, out, logsumexp, cu_seqlens, 257, num_heads)


LAUNCHES = {"CLIP ViT-L/14": lambda: launch(16, 64)}
MATRIX = {"_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"}
