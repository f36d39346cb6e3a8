"""Rotary position embedding of separate heads in plain PyTorch, for the attention libraries."""

import torch
from torch import Tensor

from ..operation import compute_dtype


def rotate_heads(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, out: Tensor, inverse: bool
) -> None:
    """out = x rotated by its positions; inverse: by their negatives. Halves as in rotary_attention.

    x, out (total_tokens, heads, head_dim) of any strides, possibly the same tensor; cos, sin
    (max_positions, head_dim / 2).
    """
    dtype = compute_dtype(x)
    cos, sin = (table[position_ids.long()][:, None].to(dtype) for table in (cos, sin))
    sin = -sin if inverse else sin
    first, second = x.to(dtype).chunk(2, -1)
    out.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
