"""Launch settings of the attention kernels: tile, warps and stages by head_dim, dtype and device.

BLOCK_M queries by BLOCK_N keys; the side that a program owns (queries, or keys for their own
gradients) is a multiple of the other. On sm_90 two warpgroups own 64 rows each: fewer would read
keys and values from L2 twice as often, more do not fit in registers. On sm_80 products take their
operands from registers, so the other side of a tile is narrower; sm_86, sm_89 and sm_120 have less
shared memory, so their tiles are smaller. Only sm_80 and sm_90 are production targets
(CODEGEN.md); the choices for the others compile and fit. None is measured. Imports no triton, as
launch.py.
"""

from torch import Tensor

from . import launch
from .launch import VECTOR_BYTES, WARP, next_power_of_2

Settings = dict[str, int]
# on sm_90, 16-bit; where a program owns keys, QUERY_TILE keys by KEY_TILE queries
QUERY_TILE, KEY_TILE = 128, 64
MAX_COLUMNS = 128  # of a tile of a head: with 256, tiles spill registers or exceed shared memory


def block_columns(head_dim: int) -> int:
    """Columns of a tile of one head: matrix units need a power of two of at least 16."""
    return max(next_power_of_2(head_dim), 16)


def rotate_keys(qkv: Tensor, head_dim: int) -> tuple[int, int]:
    """Tokens and heads of a program that rotates heads; a thread holds 16 bytes of each half."""
    if launch.is_interpreted(qkv):  # its time does not depend on the tile
        return 256, 8
    elements = 4 * WARP * VECTOR_BYTES // min(qkv.element_size(), 4)
    return max(2 * elements // block_columns(head_dim), 1), 8


def forward(qkv: Tensor, head_dim: int) -> Settings:
    if qkv.element_size() > 2:
        return _wide(qkv, head_dim)
    if launch.gpu(qkv).is_large:
        return _settings(head_dim, QUERY_TILE, KEY_TILE, 3)
    return _settings(head_dim, 128, 32, 3)


def prefix(qkv: Tensor, head_dim: int) -> tuple[Settings, Settings]:
    """For few rows in each tile, and for many.

    Few: those of one token of each sample, or of short ones, in 16 rows, the least that a matrix
    unit takes. A key's place is copied a step before the key itself, so two steps of keys in flight
    take five stages.
    """
    if qkv.element_size() > 2:
        return (_wide(qkv, head_dim),) * 2
    if block_columns(head_dim) > head_dim:  # copied in pieces, whose addresses are many
        few = _settings(head_dim, 16, 32, 3) | {"num_warps": 4}
        return few, _settings(head_dim, 64, 64 if launch.gpu(qkv).is_large else 32, 3)
    few = _settings(head_dim, 16, 64, 5)
    return few, _settings(head_dim, 64, 32, 5) | {"num_warps": 4}  # 3 programs a multiprocessor


def shared_prefix(qkv: Tensor, head_dim: int) -> Settings:
    """Few keys, so nothing to pipeline: a program ends after one or two tiles of them."""
    if qkv.element_size() > 2:
        return _wide(qkv, head_dim)
    return _settings(head_dim, 64, 32 if launch.gpu(qkv).is_large else 16, 1)


def backward(qkv: Tensor, head_dim: int) -> tuple[Settings, Settings]:
    """For the gradient of queries, and for those of keys and values."""
    if qkv.element_size() > 2:
        wide = _wide(qkv, head_dim)
        if qkv.element_size() == 4 and block_columns(head_dim) > 64:  # or hundreds of spills
            wide["num_warps"] = 16
        return wide, wide
    narrow, gpu = block_columns(head_dim) <= 64, launch.gpu(qkv)
    if gpu.is_large:
        by_queries = _settings(head_dim, QUERY_TILE, KEY_TILE, 3)
        return by_queries, _settings(head_dim, other_query_tile(head_dim), QUERY_TILE, 3)
    if narrow:
        return _settings(head_dim, 64, 64, 3), _settings(head_dim, 32, 128, 3)
    if gpu.is_small:
        return _settings(head_dim, 64, 32, 3), _settings(head_dim, 32, 64, 3)
    return (_settings(head_dim, 64, 64, 3),) * 2


def other_query_tile(head_dim: int) -> int:
    """Queries beside QUERY_TILE keys, on sm_90: 64 of 128 columns leave no registers for a stage
    more than two, so that no copy would be in flight while the kernel waits for one."""
    return KEY_TILE if block_columns(head_dim) <= 64 else 32


def _wide(qkv: Tensor, head_dim: int) -> Settings:
    """For fp32 and fp64, multiplied without matrix units: small, since a thread holds whole rows of
    both operands."""
    side = 16 if qkv.element_size() > 4 and launch.gpu(qkv).is_small else 32
    if launch.is_interpreted(qkv):  # its time does not depend on the tile
        side = 64
    return _settings(head_dim, side, side, 1)


def _settings(head_dim: int, queries: int, keys: int, num_stages: int) -> Settings:
    if block_columns(head_dim) > MAX_COLUMNS:
        raise NotImplementedError(
            f"attention in Triton takes a head_dim of at most {MAX_COLUMNS}, not {head_dim}. "
            "MMALIGN_BACKEND=flash_attn runs it up to 256, MMALIGN_BACKEND=reference any"
        )
    return dict(
        BLOCK_M=queries,
        BLOCK_N=keys,
        BLOCK_D=block_columns(head_dim),
        num_warps=8,  # two warpgroups
        num_stages=num_stages,
    )
