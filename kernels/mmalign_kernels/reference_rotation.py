"""Rotary position embedding of separate heads in plain PyTorch, for libraries that have none."""

import torch
from torch import Tensor

from .rms_norm import wide_type


def rotate_heads(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, out: Tensor, back: bool
) -> None:
    """out = x turned by its positions; back: by their negatives. Halves as in rotary_attention.

    x, out (total_tokens, heads, head_dim), any strides, or one and the same; cos, sin
    (max_positions, head_dim / 2).
    """
    wide = wide_type(x)
    cos, sin = (table[position_ids.long()][:, None].to(wide) for table in (cos, sin))
    sin = -sin if back else sin
    first, second = x.to(wide).chunk(2, -1)
    out.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
