"""Rotation of heads for libraries: LLaMA2-7B's q and k, OpenLLaMA-3B's, grouped ones, and back."""

import torch
from mmalign_kernels.triton import rotation

from ..compiler import meta

TOKENS, POSITIONS = 16384, 2048
MODELS = {  # heads, key and value heads, head_dim, head_dim of the library's tensors
    "LLaMA2-7B": (32, 32, 128, 128),
    "OpenLLaMA-3B": (32, 32, 100, 104),
    "grouped, head_dim 64": (32, 4, 64, 64),
}


def launch(num_heads: int, num_kv_heads: int, head_dim: int, padded: int) -> None:
    heads = meta(TOKENS, (num_heads + 2 * num_kv_heads) * head_dim).unflatten(1, (-1, head_dim))
    cos, sin = (meta(POSITIONS, head_dim // 2, dtype=torch.float32) for _ in range(2))
    angles = cos, sin, meta(TOKENS, dtype=torch.int32)
    unrotated = heads[:, :-num_kv_heads]
    rotated = meta(*unrotated.shape[:2], padded)[..., :head_dim]
    rotation.rotate_heads(unrotated, *angles, rotated, False)
    rotation.rotate_heads(rotated[:, :num_heads], *angles, heads[:, :num_heads], True)


LAUNCHES = {name: lambda heads=heads: launch(*heads) for name, heads in MODELS.items()}
# 128 bits at a time but where head_dim is 100: its halves are 100 bytes
