"""Launch settings of the attention kernels: tile, warps and stages by head_dim, type and device.

BLOCK_M queries by BLOCK_N keys; what a program owns (queries, or keys for their own gradients) is a
multiple of the other. On sm_90 two warpgroups own 64 rows each: fewer would read keys and values
from L2 twice as often, more do not fit in the registers. On sm_80 products take their operands from
registers, so the other side of a tile is narrower.
"""

from torch import Tensor

from .launch import VECTOR_BYTES, WARP, gpu, next_power_of_2

Settings = dict[str, int]


def block_columns(head_dim: int) -> int:
    """Columns of a tile of one head: matrix units take a power of two, from 16 on."""
    return max(next_power_of_2(head_dim), 16)


def turn_keys(qkv: Tensor, head_dim: int) -> tuple[int, int]:
    """Tokens and key heads of a program; a thread's part of the tokens' half heads is 16 bytes."""
    if qkv.is_cpu:  # the interpreter takes the same time for any tile
        return 256, 8
    elements = 4 * WARP * VECTOR_BYTES // min(qkv.element_size(), 4)
    return max(2 * elements // block_columns(head_dim), 1), 8


def forward(qkv: Tensor, head_dim: int) -> Settings:
    if qkv.element_size() > 2:
        return _settings(head_dim, *_square(qkv), 1)
    if gpu(qkv).capability >= 90:
        return _settings(head_dim, 128, 64, 3)
    return _settings(head_dim, 128, 32, 3)


def prefix(qkv: Tensor, head_dim: int) -> Settings:
    """Few queries: the segments of a tree are short, and rows beyond them are wasted.

    Four warps, so that two programs share a multiprocessor; a head that does not fill its tile is
    copied in smaller pieces, whose addresses need the registers of eight.
    """
    if qkv.element_size() > 2:
        return _settings(head_dim, *_square(qkv), 1)
    if block_columns(head_dim) == head_dim:
        return _settings(head_dim, 64, 32, 2) | {"num_warps": 4}
    return _settings(head_dim, 64, 64 if gpu(qkv).capability >= 90 else 32, 2)


def shared_prefix(qkv: Tensor, head_dim: int) -> Settings:
    """Few keys, so nothing to pipeline: a program is over after one or two tiles of them."""
    if qkv.element_size() > 2:
        return _settings(head_dim, *_square(qkv), 1)
    return _settings(head_dim, 64, 32, 1)


def backward(qkv: Tensor, head_dim: int) -> tuple[Settings, Settings]:
    """For the gradients of queries, and for those of keys and values."""
    if qkv.element_size() > 2:
        return (_settings(head_dim, *_square(qkv), 1),) * 2
    narrow = block_columns(head_dim) <= 64
    if gpu(qkv).capability >= 90:  # a third stage of wide tiles spills in the second kernel
        stages = 3 if narrow else 2
        return _settings(head_dim, 128, 64, 3), _settings(head_dim, 64, 128, stages)
    return (
        _settings(head_dim, 64, 64, 3),
        _settings(head_dim, *((32, 128) if narrow else (64, 64)), 3),
    )


def _square(qkv: Tensor) -> tuple[int, int]:
    """For fp32 and fp64, which are multiplied as they are: small, as no matrix unit does it."""
    side = 64 if qkv.is_cpu else 32  # the interpreter takes the same time for any tile
    return side, side


def _settings(head_dim: int, queries: int, keys: int, num_stages: int) -> Settings:
    return dict(
        BLOCK_M=queries,
        BLOCK_N=keys,
        BLOCK_D=block_columns(head_dim),
        num_warps=8,  # two warpgroups
        num_stages=num_stages,
    )
