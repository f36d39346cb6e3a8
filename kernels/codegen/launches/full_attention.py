"""Full attention at the shape of CLIP ViT-L/14."""

import torch
from mmalign_kernels.triton import full_attention as attention

from ..compiler import meta

TOKENS, IMAGES, HEADS, HEAD_DIM = 32 * 257, 32, 16, 64


def launch() -> None:
    qkv = meta(TOKENS, 3 * HEADS * HEAD_DIM)
    cu_seqlens = meta(IMAGES + 1, dtype=torch.int32)
    out, logsumexp = attention.full_attention_fwd(qkv, cu_seqlens, 257, HEADS)
    attention.full_attention_bwd(out, qkv, out, logsumexp, cu_seqlens, 257, HEADS)


LAUNCHES = {"CLIP ViT-L/14": launch}
MATRIX = {"_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel"}
