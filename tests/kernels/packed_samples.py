"""Packed samples, and the block-diagonal mask that says the same to Hugging Face's attention."""

import torch
from torch import Tensor


def offsets(lengths: list[int], device: str | None = None) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n, dtype=torch.int32) for n in (*lengths, 0)])


def block_mask(lengths: list[int], causal: bool, dtype: torch.dtype) -> Tensor:
    """(1, 1, total_tokens, total_tokens): 0 where a token may look, the lowest number elsewhere."""
    sample = torch.repeat_interleave(torch.tensor(lengths))
    allowed = sample[:, None] == sample[None]
    if causal:
        allowed = allowed.tril()
    mask = torch.zeros(len(sample), len(sample), dtype=dtype)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


def rotary_table(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return angles.cos(), angles.sin()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula, for fp64: transformers' eager attention takes the softmax in fp32 at most.

    (1, heads, total_tokens, head_dim) -> (total_tokens, heads * head_dim).
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + mask
    return (scores.softmax(3) @ v)[0].transpose(0, 1).flatten(1)
